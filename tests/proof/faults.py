"""Plants 40 faults in a copy of the package, one at a time, and runs the tests that have to catch each.

`python tests/proof/faults.py` takes a quarter of an hour at most on one quiet core. A fault is one that gives wrong
results, or does harm, in silence. It counts as caught where a named test fails; one that breaks the import does not.

The table names neither the modules of the package nor the folders of the tests, so that files can move: the old text
is looked for in the whole package, where it has to stand once. Where code was written anew, plant the fault again by
its meaning; where a test was renamed, name the new one.
"""
import argparse
import contextlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ['OMP_NUM_THREADS'] = '1'  # before torch; its threads and forks do not go together

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = 'timm_vpl'
LIMIT = 180  # seconds for the tests of a fault


class Fault(NamedTuple):
    """A fault: the room that it is in, what it means, the text that it changes, the tests that catch it."""
    room: str
    meaning: str
    old: str
    new: str
    tests: tuple[str, ...]  # FILE::TEST, the file by its name alone


FAULTS = [
    # core: pair, terms, criterion, stages, task, methods, teacher, inputs, seeding, stochastic depth
    Fault(
        'core', 'the contrastive term moves branch a too',
        'return embed.detach() if stopped is None else stopped',
        'return embed',
        ('test_losses.py::test_default_directions',)),
    Fault(
        'core', 'the KL term moves the branch that is followed',
        'reference = reference.detach()\n        classes',
        'pass\n        classes',
        ('test_losses.py::test_default_directions',)),
    Fault(
        'core', 'copies of one image are negatives of each other',
        'copies = (sample_ids[:, None] == all_ids) & ~own',
        'copies = own & ~own',
        ('test_losses.py::test_many_images_of_few_classes_and_copies',)),
    Fault(
        'core', 'the KL term starts an epoch late',
        'if not 0 <= done < self.length',
        'if not 0 < done < self.length',
        ('test_stages.py::test_paper_default',)),
    Fault(
        'core', 'gradients of gathered negatives stay with the process that used them',
        'dist.all_reduce(total)\n        parts',
        'parts',
        ('test_gather.py::test_loss_and_gradients_equal_one_process[2]',)),
    Fault(
        'core', "DeiT's soft labels lack the factor T^2",
        'return temperature ** 2 * losses',
        'return losses',
        ('test_methods.py::test_terms_and_gradients[deit b, soft-hard]',)),
    Fault(
        'core', 'a submodel of cosub is moved by what the other learns from it',
        '.detach().sigmoid()',
        '.sigmoid()',
        ('test_methods.py::test_terms_and_gradients[cosub-hard]',)),
    Fault(
        'core', 'in alternating DML the second branch learns from what the first one said before its update',
        'output = self._refresh(self._output, self.phases[phase - 1], input)',
        'output = self._output',
        ('test_methods.py::test_terms_and_gradients[dml-hard]',)),
    Fault(
        'core', 'the moving average moves by the decay, not by what is left to 1',
        'weight=1. - decay',
        'weight=decay',
        ('test_task.py::test_ema_is_the_average_computed_by_hand',)),
    Fault(
        'core', 'frozen layers keep on moving their running statistics',
        'super().train(mode)\n        for module in self._resting:\n            module.eval()',
        'super().train(mode)',
        ('test_freeze.py::test_frozen_layers_stay_and_the_others_move',)),
    Fault(
        'core', 'a frozen teacher is in training mode',
        'return super().train(False)',
        'return super().train(mode)',
        ('test_methods.py::test_teacher_stays_as_it_is',)),
    Fault(
        'core', 'both branches draw from one stream',
        'seed_all(self.seed, what, side, *self.position',
        'seed_all(self.seed, what, *self.position',
        ('test_task.py::test_draws_depend_on_position_branch_rank_and_seed_only',)),

    # options: the table, the parser, recipes, checks
    Fault(
        'options', "the value for both branches wins over a branch's own",
        "values.get(f'{name}_{side}', values.get(name, entry.default))",
        "values.get(name, values.get(f'{name}_{side}', entry.default))",
        ('test_options.py::test_branch_value_wins_over_shared_over_default',)),
    Fault(
        'options', 'a recipe wins over the command line',
        'given = {**recipe, **command_line}',
        'given = {**command_line, **recipe}',
        ('test_options.py::test_recipe_gives_values_and_the_command_line_wins',)),
    Fault(
        'options', "the options that a run keeps leave out what is 0, '' or off",
        'if entries[dest].row.recipe and value is not None',
        'if entries[dest].row.recipe and value',
        ('test_options.py::test_values_of_a_run_are_a_recipe_of_it',)),
    Fault(
        'options', "a resumed run may have another epsilon of the optimizer",
        "'its epsilon', shown=\"the optimizer's\", resume='fixed')",
        "'its epsilon', shown=\"the optimizer's\")",
        ('test_resume.py::test_0_and_the_empty_text_are_values',)),
    Fault(
        'options', 'runs that differ in --recovery-minutes alone are two rows of a report',
        "'minutes between two recovery checkpoints', shown='none', how=True)",
        "'minutes between two recovery checkpoints', shown='none')",
        ('test_report.py::test_how_a_run_was_done_makes_no_row',)),
    Fault(
        'options', 'a recipe of somebody else names files that timm reads for a model',
        "('cache_dir', 'checkpoint_path', ",
        "('cache_dir', ",
        ('test_hostile.py::test_a_recipe_chooses_no_files_for_timm[checkpoint_path]',)),
    Fault(
        'options', 'the name of a shard may end in a command of a shell',
        'all(map(SHARD.fullmatch, parts))',
        'all(map(SHARD.match, parts))',
        ('test_hostile.py::test_splits_run_no_commands',)),

    # data: images, labels, splits, order, draws, loaders
    Fault(
        'data', 'each epoch has the order of the first',
        'default_rng((self.seed, epoch))',
        'default_rng((self.seed, 0))',
        ('test_loaders.py::test_a_global_batch_is_the_same_for_any_number_of_processes',)),
    Fault(
        'data', 'the images of a global batch depend on the number of processes',
        'order[self.rank::self.world_size][:len(self)]',
        'order[self.rank * len(self):][:len(self)]',
        ('test_loaders.py::test_a_global_batch_is_the_same_for_any_number_of_processes',)),
    Fault(
        'data', 'an epoch that is entered later begins with its first images again',
        'range(self.first_batch * self.batch_size, len(self))',
        'range(len(self))',
        ('test_loaders.py::test_an_epoch_entered_later_goes_on_where_it_would_be',)),
    Fault(
        'data', 'an image draws the same augmentation in each epoch',
        "seed_all(self.seed, 'sample', place.epoch, place.position)",
        "seed_all(self.seed, 'sample', place.index)",
        ('test_loaders.py::test_draws_are_those_of_a_place',)),
    Fault(
        'data', 'Random Erasing draws the same for each batch',
        'self.place = (epoch, batch + 1)',
        'self.place = (epoch, batch)',
        ('test_loaders.py::test_draws_are_those_of_a_place',)),
    Fault(
        'data', '--mixup-off-epoch has no effect',
        'self.collate.mixup_enabled = epoch < self.mixup_off_epoch',
        'self.collate.mixup_enabled = True',
        ('test_loaders.py::test_mixup_ends_with_its_epoch',)),
    Fault(
        'data', "classes are numbered in the order of the alphabet, not in timm's",
        'enumerate(sorted(paths, key=lambda name: (natural_key(name), name)))',
        'enumerate(sorted(paths))',
        ('test_splits.py::test_class_order_is_total',)),

    # engine: building, optimizer, loop, step, evaluation, checkpoints, going on
    Fault(
        'engine', "branch b has the weight decay of branch a",
        "'weight_decay': branch.weight_decay",
        "'weight_decay': options.branches['a'].weight_decay",
        ('test_pair.py::test_named_groups_of_the_script_are_each_branchs_own',)),
    Fault(
        'engine', 'the last, shorter update of an epoch has too small a gradient',
        'size = tail if batch >= self.num_batches - tail else self.accum_steps',
        'size = self.accum_steps',
        ('test_train.py::test_accumulated_batches_are_one_large_batch',)),
    Fault(
        'engine', 'a schedule by updates counts batches of the epoch',
        'run.scheduler.step_update(run.num_updates)\n        clock.tick()',
        'run.scheduler.step_update(progress.batch - 1)\n        clock.tick()',
        ('test_train.py::test_a_schedule_by_updates',)),
    Fault(
        'engine', 'an update with a gradient that is not a number is made',
        'if self.scaler is not None or (self.skip and found is not None):',
        'if self.scaler is not None:',
        ('test_finite.py::test_skip_leaves_the_update_out[]',)),
    Fault(
        'engine', 'the figures of the moving average are those of the raw weights',
        'model: Any = run.task.get_eval_model(ema=ema)',
        'model: Any = run.task.get_eval_model()',
        ('test_validate.py::test_figures_of_a_run_are_those_of_its_summary',)),
    Fault(
        'engine', 'a resumed run has its raw weights as their average',
        "checkpoint.get('state_dict_ema', checkpoint['state_dict'])",
        "checkpoint['state_dict']",
        ('test_resume.py::test_stopped_in_mid_epoch[workers]',)),
    Fault(
        'engine', 'the updates of the present epoch do not count',
        'return self.progress.epoch * self.updates_per_epoch + in_epoch',
        'return self.progress.epoch * self.updates_per_epoch',
        ('test_train.py::test_a_schedule_by_updates',)),
    Fault(
        'engine', 'a checkpoint of somebody else lets files outside its folder be deleted',
        "if re.fullmatch(r'checkpoint-\\d+\\.pth\\.tar', name, re.ASCII)",
        "if isinstance(name, str) and name.endswith('.pth.tar') or '/' in name",
        ('test_hostile.py::test_a_saver_of_others_names_files_of_its_folder',)),
    Fault(
        'engine', 'images without a ReaL label count as wrong ones',
        'labelled = (target != PAD).any(dim=-1)',
        'labelled = torch.ones(len(target), dtype=torch.bool)',
        ('test_validate.py::test_sets_of_labels_against_a_plain_loop',)),
    Fault(
        'engine', 'the raw weights are exported, not their average',
        'use_ema = averaged and not only_raw if ema is None else ema',
        'use_ema = bool(averaged and ema)',
        ('test_export.py::test_branches_reload_to_the_bit',)),

    # tools: validate, export and card, report
    Fault(
        'tools', "labels of the data are taken for the model's, whatever the order of the classes",
        'if indices is not None:\n            dataset.label_map',
        'if indices == []:\n            dataset.label_map',
        ('test_validate.py::test_classes_by_name',)),
    Fault(
        'tools', 'the name of an export may lead out of its folder',
        "re.fullmatch(r'\\w[\\w.-]{,95}', name, re.ASCII)",
        "re.match(r'\\w[\\w.-]{,95}', name, re.ASCII)",
        ('test_hostile.py::test_names_of_exports_stay_inside',)),
    Fault(
        'tools', 'the interval of a difference has a degree of freedom too many',
        't_quantile(level, n - 1)',
        't_quantile(level, n)',
        ('test_report.py::test_a_planted_gain_is_found',)),
    Fault(
        'tools', 'runs on other data or in another environment are pairs',
        'return repr((self.data, self.environment)) if self.data and self.environment else None',
        "return 'same'",
        ('test_report.py::test_seeds_pair_in_one_environment_on_the_same_data',)),
]


def place_of(fault: Fault, root: Path) -> Path:
    """Return the module in which a fault is planted.

    Raises:
        SystemExit: The old text does not stand exactly once in the package.
    """
    found = [path for path in sorted((root / PACKAGE).rglob('*.py'))
             for _ in range(path.read_text(encoding='utf-8').count(fault.old))]
    if len(found) != 1:
        places = ', '.join(str(path.relative_to(root)) for path in found) or 'nowhere'
        raise SystemExit(f'fault {FAULTS.index(fault) + 1}, {fault.meaning}: its old text stands {len(found)} times '
                         f'({places}), not once; plant it again by its meaning:\n{fault.old}')
    return found[0]


def test_ids(fault: Fault, root: Path) -> list[str]:
    """Return the tests of a fault with the paths of their files.

    Raises:
        SystemExit: There is no such file, or several.
    """
    ids = []
    for test in fault.tests:
        file, _, name = test.partition('::')
        found = list((root / 'tests').rglob(file))
        if len(found) != 1:
            raise SystemExit(f'{len(found)} files {file} in tests, expected one')
        ids.append(f'{found[0]}::{name}')
    return ids


def run_tests(ids: list[str], root: Path, log: Path) -> int | None:
    """Run tests of a copy in a process of their own, and return pytest's exit status; None for one that hangs."""
    pid = os.fork()
    if pid == 0:
        _become_pytest(ids, root, log)
    deadline = time.monotonic() + LIMIT * max(1, len(ids) / 4)
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _become_pytest(ids, root, log):
    status = 70
    try:
        os.setpgid(0, 0)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.chdir(root)
        sys.path.insert(0, str(root))
        # No compiled modules: a fault of the same length within a second would be taken for the module before.
        sys.dont_write_bytecode = True
        os.environ.update(PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE='1')
        import pytest
        temporary = tempfile.mkdtemp(prefix='tests-', dir=root.parent)
        status = pytest.main([
            '-n', '0', '-x', '-p', 'no:cacheprovider', '-m', '', '--basetemp', temporary, '--durations', '5', *ids])
        shutil.rmtree(temporary, ignore_errors=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(status))


def prove(numbers: list[int], root: Path) -> list[int]:
    """Plant faults one at a time, print a line for each, and return the numbers of those that are not caught.

    Raises:
        SystemExit: A fault has no place, or a test fails without any.
    """
    faults = {number: FAULTS[number - 1] for number in numbers}
    places = {number: place_of(fault, root) for number, fault in faults.items()}
    every = list(dict.fromkeys(test for fault in faults.values() for test in test_ids(fault, root)))
    log = root.parent / 'log.txt'
    seconds, status = _timed(run_tests, every, root, log)
    if status != 0:
        raise SystemExit(f'without a fault: status {status}\n{log.read_text()[-4000:]}')
    print(f'without a fault: all tests pass, {seconds:.0f} s', flush=True)
    missed = []
    for number, fault in faults.items():
        path = places[number]
        before = path.read_text(encoding='utf-8')
        path.write_text(before.replace(fault.old, fault.new), encoding='utf-8')
        seconds, status = _timed(run_tests, test_ids(fault, root), root, log)
        path.write_text(before, encoding='utf-8')
        verdict = {1: 'caught', 0: 'NOT CAUGHT', None: f'HANGS for {LIMIT} s'}.get(status, f'BROKEN, status {status}')
        print(f'{number:2}  {fault.room:8}{verdict}, {seconds:.0f} s: {fault.meaning}', flush=True)
        if status != 1:
            missed.append(number)
            print(log.read_text()[-1500:], flush=True)
    return missed


def _timed(function: Callable, *args) -> tuple[float, int | None]:
    begun = time.monotonic()
    result = function(*args)
    return time.monotonic() - begun, result


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', type=int, metavar='N', choices=range(1, len(FAULTS) + 1),
                        help='numbers of faults, as --list shows them')
    parser.add_argument('--list', action='store_true', help='print the faults, where they are planted, and their tests')
    args = parser.parse_args(argv)
    numbers = args.only or list(range(1, len(FAULTS) + 1))
    if args.list:
        for number in numbers:
            fault = FAULTS[number - 1]
            path = place_of(fault, ROOT).relative_to(ROOT)
            print(f'{number:2}  {fault.room:8}{fault.meaning} ({path}; {", ".join(fault.tests)})')
        return 0
    with contextlib.redirect_stdout(io.StringIO()):
        # Once for all tests; nothing of the package, and nothing that a fault could change.
        import timm
        import torch
        import torchvision  # noqa: F401
        torch.set_num_threads(1)
        timm.list_models()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix='timm-vpl-proof-') as work:
        root = Path(work, 'checkout')
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(
            '.git', '__pycache__', 'output', '.*_cache', 'results', '*.egg-info'))
        missed = prove(numbers, root)
    print(f'{len(numbers) - len(missed)} of {len(numbers)} faults caught, {time.monotonic() - begun:.0f} s'
          + (f'; not caught: {missed}' if missed else ''))
    return bool(missed)


if __name__ == '__main__':
    sys.exit(main())
