# SPDX-License-Identifier: Apache-2.0
"""A small synthetic cohort of slides and reports, and the demonstration that trains on it from scratch."""
