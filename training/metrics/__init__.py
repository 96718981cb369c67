# SPDX-License-Identifier: Apache-2.0
"""Metrics as modules of the library `evaluate`: a folder each, which is a metric Space as it is."""
