# SPDX-License-Identifier: Apache-2.0
"""The page of `dre-slcl view`: deep zoom, and what of a slide matches a text."""
