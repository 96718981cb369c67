# SPDX-License-Identifier: Apache-2.0
"""The metric `calibration_error`."""
