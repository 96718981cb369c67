# SPDX-License-Identifier: Apache-2.0
"""Evaluation of slide or case embeddings, ours or anybody's: protocol, methods, null rows, results."""
