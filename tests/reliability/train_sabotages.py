# SPDX-License-Identifier: Apache-2.0
"""R2: would `train_kills` notice? Breaks training in eight ways, one after the other, and kills until it does.

Each must be noticed within twenty kills: a part of the state that a resumed run does not get back (optimizer,
learning rate, bank, codebook, which tiles of the bank are filled, the step), a checkpoint that has its name before its
data, and an old checkpoint that goes before the new one is there. `--count` is the greatest number of kills.
"""

import shutil
from pathlib import Path

from dre_slcl.training import checkpoint, optimizer
from dre_slcl.training.sampler import StepSampler
from modeling_dre_slcl import DreSlclModel, atomic_files
from modeling_dre_slcl.memory_bank import MemoryBank

from . import training_runs as runs
from .campaign import check, run_campaign
from .train_kills import NUM_LANES, kill_runs, measure


def _skip_optimizer():
    runs.replace_everywhere(checkpoint.restore_optimizer, lambda *arguments: None)


def _restart_schedule():
    """The learning rate counts steps from where this process began."""
    original, first = optimizer.set_learning_rates, []

    def set_learning_rates(adam, step, config):
        first.append(step)
        return original(adam, step - first[0], config)

    runs.replace_everywhere(original, set_learning_rates)


def _skip_bank():
    MemoryBank.load_slide_state = lambda self, slides, state: None


def _skip_codebook():
    load = DreSlclModel.load_state_dict

    def load_state_dict(self, state, *arguments, **options):
        kept = {name: self.codebook if name.endswith("codebook") else value for name, value in state.items()}
        return load(self, kept, *arguments, **options)

    DreSlclModel.load_state_dict = load_state_dict


def _forget_what_is_filled():
    runs.after(MemoryBank, "load_slide_state", lambda bank, result: bank.written_step.fill_(-1))


def _restart_steps():
    """Slides and tiles are drawn for the steps counted from where this process began."""
    plan, first = StepSampler.plan, []

    def plan_from_start(self, step):
        first.append(step)
        return plan(self, step - first[0])

    StepSampler.plan = plan_from_start


def _rename_before_data():
    """A checkpoint is written under its final name, and a folder with that name is trusted."""
    mkdir, prefix, commit = Path.mkdir, atomic_files.TEMPORARY_PREFIX, atomic_files.commit_folder

    def commit_or_be_there(temporary, target):
        if temporary.is_symlink():
            temporary.unlink()
        else:
            commit(temporary, target)

    def mkdir_of_final_name(self, *arguments, **options):
        if self.is_symlink():
            return  # made before, and asked for again by whoever writes a file there
        if self.name.startswith(f"{prefix}step-"):
            final = self.with_name(self.name.removeprefix(prefix))
            mkdir(final, *arguments, **options)
            self.symlink_to(final)
        else:
            mkdir(self, *arguments, **options)

    Path.mkdir = mkdir_of_final_name
    runs.replace_everywhere(commit, commit_or_be_there)
    runs.replace_everywhere(checkpoint.validate_checkpoint, lambda path: None)


def _rotate_before_commit():
    save = checkpoint.CheckpointFolder.save

    def remove_and_save(self, *arguments, **options):
        for path in self.folder.glob("step-*"):
            shutil.rmtree(path)
        save(self, *arguments, **options)

    checkpoint.CheckpointFolder.save = remove_and_save


SABOTAGES = {
    "optimizer": _skip_optimizer,
    "schedule": _restart_schedule,
    "bank": _skip_bank,
    "codebook": _skip_codebook,
    "filled tiles": _forget_what_is_filled,
    "steps": _restart_steps,
    "name before data": _rename_before_data,
    "rotate before commit": _rotate_before_commit,
}


def campaign(root, count, seed):
    settings, problems, kills, faults = runs.prepare(root, keep_checkpoints=1), [], {}, {}
    measured = measure(settings)

    def lane(number):
        found = {}
        for name in list(SABOTAGES)[number::NUM_LANES]:
            mine = settings | {"output_dir": str(root / f"lane-{number}")}
            figures, noticed = kill_runs(mine, count, seed, measured, SABOTAGES[name], max_faults=1)
            found[name] = (figures["kills"], noticed)
            runs.remove(mine)
        return found

    for found in runs.share_out(lane, range(NUM_LANES)):
        kills |= {name: number for name, (number, _) in found.items()}
        faults |= {name: noticed for name, (_, noticed) in found.items()}
    for name, noticed in faults.items():
        check(problems, noticed, f"{name}: not noticed within {count} kills")
    caught = sum(bool(noticed) for noticed in faults.values())
    figures = {"cases": len(SABOTAGES), "faults": len(problems), "noticed": caught}
    return figures | {"kills_until_noticed": {name: kills[name] for name in SABOTAGES}}


if __name__ == "__main__":
    run_campaign(campaign, count=20, doc=__doc__)
