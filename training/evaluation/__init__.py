# SPDX-License-Identifier: Apache-2.0
"""Evaluation of slide or case embeddings of any origin: protocol, methods, null rows, and what is written of it."""
