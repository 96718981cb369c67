# SPDX-License-Identifier: Apache-2.0
"""Slides to datasets, end-to-end training, evaluation, and the demo."""
