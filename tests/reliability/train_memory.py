# SPDX-License-Identifier: Apache-2.0
"""M3, M4: what the memory bank takes, and what encoding a slide takes, however many tiles it has.

The bank must take tiles x width x 2 bytes and at most 5% more, and nothing of it may be in the published weights. The
greatest memory of a process that encodes a slide of 100 tiles must be, within 5%, that of one of 10,000 tiles
(`--count`), for they pass through in chunks.
"""

import resource

import torch
from safetensors.torch import load_file

from modeling_dre_slcl.memory_bank import MemoryBank

from .. import tiny_models
from . import training_runs as runs
from .campaign import check, run_campaign

MAX_BANK_SHARE, MAX_PEAK_SHARE = 1.05, 1.05
WIDTH, NUM_CODEWORDS, NUM_TILES, NUM_SLIDES = 1024, 16, 8_000, 4
CHUNK = 50


def bank_share():
    """Bytes of all tables of a bank in relation to those of its features in float16."""
    bank = MemoryBank(WIDTH, NUM_CODEWORDS)
    bank.allocate([NUM_TILES] * NUM_SLIDES)
    taken = sum(table.numel() * table.element_size() for _, table in bank.named_buffers())
    return taken / (NUM_SLIDES * NUM_TILES * WIDTH * 2)


def peak_mb(num_tiles):
    """The greatest memory of a process that encodes a slide of so many tiles in chunks, in MB."""
    model = tiny_models.tiny_model()
    state = model.empty_state()
    with torch.inference_mode():
        for start in range(0, num_tiles, CHUNK):
            tiles = torch.full((min(CHUNK, num_tiles - start), 3, tiny_models.IMAGE_SIZE, tiny_models.IMAGE_SIZE), 0.1)
            state.add(model.get_tile_features(tiles), model.codebook)
        model.get_state_features(state)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def campaign(root, count, seed):
    settings, problems = runs.prepare(root, num_steps=1, finalize_steps=0, codebook_refits=[]), []
    share = bank_share()
    check(problems, share <= MAX_BANK_SHARE, f"the bank takes {share:.3f} of its features' bytes")
    runs.expect_success(settings)
    names = load_file(f"{settings['output_dir']}/model/model.safetensors")
    in_model = [name for name in names if "bank" in name]
    check(problems, not in_model, f"the published weights hold {in_model}")
    few, many = (runs.share_out(peak_mb, [number])[0] for number in (100, count))
    check(problems, many <= MAX_PEAK_SHARE * few, f"{few:.0f} MB for 100 tiles, {many:.0f} MB for {count}")
    figures = {"cases": 3, "faults": len(problems), "bank_bytes_to_features": round(share, 4)}
    return figures | {"peak_mb_100_tiles": round(few), f"peak_mb_{count}_tiles": round(many)}


if __name__ == "__main__":
    run_campaign(campaign, count=10_000, doc=__doc__)
