# SPDX-License-Identifier: Apache-2.0
"""Evaluation of slide or case embeddings, whoever made them: protocol, methods, null rows, and what is written."""
