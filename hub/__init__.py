# SPDX-License-Identifier: Apache-2.0
"""Publishing to the Hugging Face Hub: model card, checks before upload, upload."""
