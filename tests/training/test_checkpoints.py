import contextlib
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rlaif_jax.errors import UserError, room_in
from rlaif_jax.models.parameters import abstract_parameters
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.training.checkpoints import Checkpoints, check_whole, restore_params
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.state import abstract_state
from tests.helpers import eight_devices, flip_a_byte, largest_file, one_device, optimizer_config, tiny

CONFIG = tiny(num_key_value_heads=4)
OPTIMIZER = make_optimizer(optimizer_config(schedule="cosine", warmup_steps=2), 10)


def abstract(placement, **changes):
    return abstract_state(LanguageModel(tiny(num_key_value_heads=4, **changes)), OPTIMIZER, placement)


@functools.cache
def target():
    return abstract(one_device())


def random_state(placement, seed=0):
    rng = np.random.default_rng(seed)

    def draw(x):
        values = rng.normal(size=x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else rng.integers(1, 99, x.shape)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree.map(draw, target() if placement == one_device() else abstract(placement))


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "checkpoints"


def save(folder, steps, keep_best="", metrics=None, keep_every=0):
    """Saves a state at each step; the metric `loss` is the step."""
    with contextlib.closing(Checkpoints(folder, keep_best, keep_every)) as checkpoints:
        for step in steps:
            checkpoints.save(step, random_state(one_device(), step), (metrics or {}).get(step, {"loss": step}))


def steps_in(folder):
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    assert sorted(int(path.stem) for path in (folder / "checksums").iterdir()) == steps
    return steps


def resumed_step(folder):
    """The step that a stage would go on from, once its state is seen to be the one saved."""
    resumed = Checkpoints(folder).resume(target())
    if resumed is None:
        return None
    step, state = resumed
    jax.tree.map(np.testing.assert_array_equal, state, random_state(one_device(), step))
    return step


@pytest.mark.parametrize("mesh", [eight_devices, one_device])
def test_a_state_comes_back_bit_equal_on_any_mesh(folder, mesh):
    state = random_state(eight_devices())
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(7, state, {})
    step, restored = Checkpoints(folder).resume(abstract(mesh()))
    assert step == 7
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    shardings = jax.tree.map(lambda x: x.sharding, abstract(mesh()))
    jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim) or pytest.fail(str(y)), restored, shardings)


def test_the_newest_two_are_kept_and_the_newest_is_read(folder):
    assert resumed_step(folder) is None
    save(folder, [1, 2, 3])
    assert steps_in(folder) == [2, 3]
    assert resumed_step(folder) == 3
    params = restore_params(folder, 2, abstract_parameters(LanguageModel(CONFIG), one_device()))
    jax.tree.map(np.testing.assert_array_equal, params, random_state(one_device(), 2).params)


def test_a_checkpoint_that_sigterm_made_is_never_the_best(folder):
    with contextlib.closing(Checkpoints(folder, "min loss")) as checkpoints:
        for step, loss, planned in ((2, 0.5, True), (3, 0.1, False), (4, 0.9, True), (6, 0.8, True)):
            checkpoints.save(step, random_state(one_device(), step), {"loss": loss}, planned)
    assert steps_in(folder) == [2, 4, 6]


@pytest.mark.parametrize(("keep_best", "best"), [("min loss", 1), ("max loss", 3)])
def test_the_best_is_kept_beside_the_newest_two_also_after_a_restart(folder, keep_best, best):
    losses = {1: 0.1, 2: 0.5, 3: 0.9, 4: 0.4, 5: 0.5, 6: 0.6}
    metrics = {step: {"loss": loss, "other": -loss} for step, loss in losses.items()}
    save(folder, [1, 2, 3, 4], keep_best, metrics)
    save(folder, [5, 6], keep_best, metrics)
    assert steps_in(folder) == [best, 5, 6]
    assert resumed_step(folder) == 6


def test_every_third_is_kept_beside_the_best_and_the_newest_two_also_after_a_restart(folder, capfd):
    save(folder, [1, 2, 3, 4, 5], "min loss", keep_every=3)
    save(folder, [6, 7, 8], "min loss", keep_every=3)
    assert steps_in(folder) == [1, 3, 6, 7, 8]
    flip_a_byte(largest_file(folder / "3"))
    assert resumed_step(folder) == 8 and capfd.readouterr().err == ""  # what is not read is not looked at
    with pytest.raises(UserError, match=r"checkpoints/3 has other bytes"):
        check_whole(folder, 3)
    check_whole(folder, 6)


def test_no_metric_makes_the_latest_go(folder):
    for step, loss in enumerate([0.1, 0.9, 0.8, 0.0, 0.7], 1):
        save(folder, [step], "min loss", {step: {"loss": loss}})
        assert {step, max(step - 1, 1)} <= set(steps_in(folder))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_byte, _truncate, Path.unlink])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, capfd, damage):
    save(folder, [2, 4])
    damage(largest_file(folder / "4"))
    assert resumed_step(folder) == 2
    error = capfd.readouterr().err.strip()
    assert error.count("\n") == 0 and "deleted checkpoint" in error and f"{folder}/4" in error, error
    assert steps_in(folder) == [2]
    save(folder, [4])  # the same step again, which Orbax refuses while there is one
    assert resumed_step(folder) == 4


def test_every_file_of_a_checkpoint_is_checked(folder):
    save(folder, [2])
    files = [path for path in Path(folder / "2").rglob("*") if path.is_file()]
    assert len(files) > 10
    whole = {path: path.read_bytes() for path in files if path.stat().st_size}
    for path, data in whole.items():
        flip_a_byte(path)
        with pytest.raises(UserError, match="no whole checkpoint") as error:
            resumed_step(folder)
        assert str(path.relative_to(folder / "2")) in str(error.value) and "delete it" in str(error.value)
        path.write_bytes(data)
    assert resumed_step(folder) == 2


def test_nothing_is_deleted_where_no_checkpoint_is_whole(folder):
    save(folder, [2, 4])
    for step in "24":
        flip_a_byte(largest_file(folder / step))
    with pytest.raises(UserError, match="no whole checkpoint"):
        resumed_step(folder)
    assert steps_in(folder) == [2, 4]


@pytest.mark.parametrize("before", [[], [2]])
def test_a_kill_before_the_checksums_leaves_a_checkpoint_that_does_not_count(folder, capfd, before):
    save(folder, [*before, 4])
    (folder / "checksums" / "4.json").unlink()
    (folder / "6.orbax-checkpoint-tmp").mkdir()  # what a kill within Orbax leaves
    assert resumed_step(folder) == (before[0] if before else None)
    assert capfd.readouterr().err == ""
    assert steps_in(folder) == before
    assert not (folder / "6.orbax-checkpoint-tmp").exists()
    save(folder, [4])
    assert resumed_step(folder) == 4


@pytest.mark.parametrize("left", [0, 5])
def test_a_kill_while_an_old_checkpoint_is_deleted_does_no_harm(folder, capfd, left):
    save(folder, [2, 4])
    files = [path for path in sorted(Path(folder / "2").rglob("*")) if path.is_file()]
    for path in files[left:]:
        path.unlink()
    assert resumed_step(folder) == 4
    save(folder, [6])
    assert capfd.readouterr().err == ""
    assert steps_in(folder) == [4, 6] and resumed_step(folder) == 6


def test_checksums_of_a_checkpoint_that_somebody_deleted_are_forgotten(folder):
    save(folder, [2, 4])
    (folder / "4").rmtree()
    assert resumed_step(folder) == 2
    assert steps_in(folder) == [2]


def test_later_stages_read_the_last_checkpoint_or_none(folder):
    params = abstract_parameters(LanguageModel(CONFIG), one_device())
    with pytest.raises(UserError, match=r"no checkpoint .*checkpoints/4"):
        restore_params(folder, 4, params)
    save(folder, [2, 4])
    flip_a_byte(largest_file(folder / "4" / "params"))
    with pytest.raises(UserError, match=r"checkpoints/4 has other bytes in params/"):
        restore_params(folder, 4, params)
    assert steps_in(folder) == [2, 4]


MISFITS = {
    "width": ({"hidden_size": 64}, "decoder/embedding is float32[64, 32] there, and the config wants float32[64, 64]"),
    "vocabulary": ({"vocab_size": 128}, "decoder/embedding is float32[64, 32]"),
    "layers": ({"num_hidden_layers": 3}, "decoder/layers/attention_norm/scale is float32[2, 32]"),
    "head": ({"tie_word_embeddings": False}, "lm_head is missing there, and the config wants float32[32, 64]"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_checkpoint_of_another_model_is_one_line_that_names_the_parameter(folder, case):
    changes, words = MISFITS[case]
    save(folder, [1])
    with pytest.raises(UserError, match="can't be restored") as error:
        Checkpoints(folder).resume(abstract(one_device(), **changes))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_another_dtype_is_no_silent_cast(folder):
    save(folder, [1])
    half = target().replace(opt_state=jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), target().opt_state))
    with pytest.raises(UserError, match=r"count is int32\[\] there, and the config wants bfloat16\[\]"):
        Checkpoints(folder).resume(half)


def test_a_full_disk_keeps_the_last_good_checkpoint(small_disk, capfd):
    folder = epath.Path(small_disk.folder) / "checkpoints"
    save(folder, [2])
    capfd.readouterr()
    small_disk.leave(1 << 18)
    with pytest.raises(UserError, match=rf"no space left on the disk of {folder}"), room_in(folder):
        save(folder, [4])
    assert capfd.readouterr().err == ""
    assert steps_in(folder) == [2] and resumed_step(folder) == 2
    small_disk.leave(1 << 22)
    save(folder, [4])
    assert resumed_step(folder) == 4
