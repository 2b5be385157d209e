import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.models.parameters import abstract_parameters
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.training.checkpoints import Checkpoints
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.state import abstract_state
from tests.helpers import eight_devices, one_device, optimizer_config, tiny

CONFIG = tiny(num_key_value_heads=4)
OPTIMIZER = make_optimizer(optimizer_config(schedule="cosine", warmup_steps=2), 10)


def abstract(placement, **changes):
    return abstract_state(LanguageModel(tiny(num_key_value_heads=4, **changes)), OPTIMIZER, placement)


def random_state(placement, seed=0):
    rng = np.random.default_rng(seed)

    def draw(x):
        values = rng.normal(size=x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else rng.integers(1, 99, x.shape)
        return jax.device_put(values.astype(x.dtype), x.sharding)

    return jax.tree.map(draw, abstract(placement))


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(epath.Path(tmp_path) / "checkpoints")
    yield checkpoints
    checkpoints.close()


@pytest.mark.parametrize("target", [eight_devices, one_device])
def test_a_state_comes_back_bit_equal_on_any_mesh(checkpoints, target):
    state = random_state(eight_devices())
    checkpoints.save(7, state)
    restored = checkpoints.restore(abstract(target()))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    shardings = jax.tree.map(lambda x: x.sharding, abstract(target()))
    jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim) or pytest.fail(str(y)), restored, shardings)


def test_the_newest_two_are_kept_and_the_newest_is_read(checkpoints, tmp_path):
    assert checkpoints.latest_step() is None
    states = [random_state(one_device(), seed) for seed in range(3)]
    for step, state in enumerate(states):
        checkpoints.save(step + 1, state)
    assert checkpoints.latest_step() == 3
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["2", "3"]
    params = checkpoints.restore_params(abstract_parameters(LanguageModel(CONFIG), one_device()))
    jax.tree.map(np.testing.assert_array_equal, params, states[2].params)


def test_a_checkpoint_that_is_not_there_is_one_clear_line(checkpoints):
    with pytest.raises(UserError, match=r"no checkpoint in .*checkpoints"):
        checkpoints.restore(abstract(one_device()))


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 64}, {"vocab_size": 128}, {"num_hidden_layers": 3}, {"tie_word_embeddings": False}]
)
def test_a_checkpoint_of_another_model_is_one_clear_line(checkpoints, changes):
    checkpoints.save(1, random_state(one_device()))
    with pytest.raises(UserError, match="can't be restored") as error:
        checkpoints.restore(abstract(one_device(), **changes))
    assert "\n" not in str(error.value)
