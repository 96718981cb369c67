# SPDX-License-Identifier: Apache-2.0
"""Tables as TCGA and CPTAC publish them -> manifest, labels and splits of a cohort."""
