# SPDX-License-Identifier: Apache-2.0
"""What all tests share: no network, one thread, and the markers of transformers' common tests."""

import os

# Before any Hugging Face import, which reads them once. The tests of uploads start processes with their own values.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tiny models are twice as fast on one thread, and threads that wait for each other on a busy machine far slower still.
os.environ.setdefault("OMP_NUM_THREADS", "1")

COMMON_SUITE_MARKERS = (
    *("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test", "order"),
    *("is_agent_test", "is_expert_parallel_test", "is_fsdp_test", "is_pipeline_test", "is_staging_test"),
    *("is_tensor_parallel_test", "is_training_test"),
)


def pytest_configure(config):
    for name in COMMON_SUITE_MARKERS:
        config.addinivalue_line("markers", f"{name}: set by transformers' common tests")
