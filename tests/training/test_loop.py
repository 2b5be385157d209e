import contextlib
import json

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from flax import struct

from rlaif_jax.errors import UserError
from rlaif_jax.training.checkpoints import restore_params
from rlaif_jax.training.loop import LoopConfig, train
from tests.helpers import flip_a_byte, largest_file


class Counter(struct.PyTreeNode):
    step: jax.Array
    params: dict


def init():
    return Counter(jnp.zeros((), jnp.int32), {"total": jnp.zeros((4,))})


def next_step(state, step):
    state = Counter(state.step + 1, {"total": state.params["total"] + step})
    return state, {"loss": state.params["total"][0], "tokens": 1}, lambda: [{"text": f"at {step}"}]


def run(folder, steps=6, keep_best="", step_fn=next_step, max_skipped_updates=0, keep_every=0):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), init())
    config = LoopConfig(steps, 2, keep_best, max_skipped_updates, keep_every)
    return train(folder, config, abstract, init, step_fn)


def diverging(at):
    """Updates that are skipped from step `at` on."""

    def step_fn(state, step):
        state, metrics, samples = next_step(state, step)
        skipped = max(step + 1 - at, 0)
        loss = float("nan") if skipped else metrics["loss"]
        return state, metrics | {"loss": loss, "skipped": int(skipped > 0), "skipped_updates": skipped}, samples

    return step_fn


def test_skipped_updates_are_logged_as_null_until_there_are_too_many(tmp_path, capfd):
    folder = epath.Path(tmp_path) / "sft"
    with pytest.raises(UserError, match=r"stopped at step 5: loss not finite; 3 updates.*last checkpoint is step 4"):
        run(folder, steps=8, step_fn=diverging(3), max_skipped_updates=2)
    logged = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged[3:] == [None, None] and None not in logged[:3]
    assert capfd.readouterr().err.count("loss not finite, 1 skipped") == 2


def test_a_metric_that_is_not_finite_without_a_skipped_update_stops_at_once(tmp_path):
    def step_fn(state, step):
        return state, {"loss": float("inf"), "tokens": 1}, lambda: []

    with pytest.raises(UserError, match="stopped at step 0: loss not finite"):
        run(epath.Path(tmp_path) / "sft", step_fn=step_fn, max_skipped_updates=5)


def lines(folder, name):
    return [json.loads(line)["step"] for line in (folder / name).read_text().splitlines()]


def test_a_damaged_newest_checkpoint_sends_the_stage_back_to_the_one_before(tmp_path, capfd):
    whole, folder = epath.Path(tmp_path) / "whole" / "sft", epath.Path(tmp_path) / "damaged" / "sft"
    expected = run(whole)

    def dies_at_five(state, step):
        if step == 5:
            raise KeyboardInterrupt
        return next_step(state, step)

    with contextlib.suppress(KeyboardInterrupt):
        run(folder, step_fn=dies_at_five)
    flip_a_byte(largest_file(folder / "checkpoints" / "4"))
    timed = (folder / "timing.jsonl").read_text().splitlines()
    capfd.readouterr()
    done = []
    state = run(folder, step_fn=lambda state, step: done.append(step) or next_step(state, step))
    assert done == [2, 3, 4, 5]
    assert capfd.readouterr().err.count("deleted checkpoint") == 1
    assert state.params["total"].tolist() == expected.params["total"].tolist()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (folder / name).read_text() == (whole / name).read_text()
    assert lines(folder, "timing.jsonl") == list(range(6))
    assert (folder / "timing.jsonl").read_text().splitlines()[:2] == timed[:2]


def test_an_unknown_metric_to_keep_the_best_by_fails_at_the_first_step(tmp_path):
    with pytest.raises(UserError, match=r"config\.sft\.keep_best='min lost' names no metric.*they are loss, tokens"):
        run(epath.Path(tmp_path) / "sft", keep_best="min lost")
    assert not (tmp_path / "sft" / "metrics.jsonl").read_text()


def test_the_best_checkpoint_of_a_stage_stays(tmp_path):
    run(epath.Path(tmp_path) / "sft", steps=10, keep_best="min loss")
    assert kept(tmp_path / "sft") == {2, 8, 10}


def kept(folder):
    return {int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()}


def test_every_third_state_stays_whenever_else_the_stage_saves(tmp_path):
    folder = epath.Path(tmp_path) / "rl"

    def dies_at_five(state, step):
        if step == 5:
            raise KeyboardInterrupt
        return next_step(state, step)

    with contextlib.suppress(KeyboardInterrupt):
        run(folder, steps=10, step_fn=dies_at_five, keep_every=3)
    run(folder, steps=10, keep_every=3)
    assert kept(folder) == {3, 6, 9, 10}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), init())
    for done in (3, 6):  # the state after so many steps
        params = restore_params(folder / "checkpoints", done, abstract.params)
        assert params["total"].tolist() == [sum(range(done))] * 4
