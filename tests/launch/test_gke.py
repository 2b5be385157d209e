import json

import pytest
import yaml

from rlaif_jax.parallel.processes import Place, place_from
from tests.launch.conftest import PROBE, ROOT, check_probe, free_port, terminate_one

SCRIPT = "launch/gke.sh"
TPU = ["--image=registry/image:1", "--accelerator=tpu-v6e-slice", "--topology=4x2"]
GPU = ["--image=registry/image:1", "--accelerator=nvidia-h100-80gb", "--hosts=2"]
# Ends with the next of the statuses that its own file holds.
COMMAND = """
read -r status < "$0-$JOB_COMPLETION_INDEX"
sed -i 1d "$0-$JOB_COMPLETION_INDEX"
exit "$status"
"""


def run_with(launcher, statuses, *flags):
    """The command whose two pods end with `statuses`, start by start."""
    for index, each in enumerate(zip(*statuses, strict=True)):
        (launcher.state / f"statuses-{index}").write_text("".join(f"{status}\n" for status in each))
    command = ["bash", "-c", COMMAND, launcher.state / "statuses"]
    return launcher.run(SCRIPT, "run1", *flags, "--", *command)


def rendered(launcher, *arguments):
    done = launcher.run(SCRIPT, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def places(launcher):
    return [place_from({}, env) for env in json.loads((launcher.state / "pods.json").read_text())]


def test_the_template_itself_is_yaml():
    assert yaml.safe_load((ROOT / "launch" / "gke.yaml").read_text())["kind"] == "JobSet"


def test_pods_of_tpus_find_each_other_by_what_gke_sets(launcher):
    done = run_with(launcher, [(0, 0)], *TPU)
    assert done.returncode == 0, done.stdout + done.stderr
    assert places(launcher) == [Place("run1-workers-0-0.run1:8476", 2, i) for i in range(2)]


def test_slices_are_one_program(launcher):
    for index in range(2):
        (launcher.state / f"statuses-{index}").write_text("0\n0\n")
    done = launcher.run(SCRIPT, "run1", *TPU, "--slices=2", "--", "true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert places(launcher) == [Place("run1-workers-0-0.run1:8476", 4, i) for i in range(4)]


def test_pods_of_gpus_find_each_other_by_the_jobset(launcher):
    done = run_with(launcher, [(0, 0)], *GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    assert places(launcher) == [Place("run1-workers-0-0.run1:8476", 2, i) for i in range(2)]


@pytest.mark.parametrize("statuses", [(75, 75), (137, 75)])
def test_preempted_or_lost_is_started_again(launcher, statuses):
    done = run_with(launcher, [statuses, (0, 0)], *GPU)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run1: Completed" in done.stderr


def test_bad_input_fails_at_once(launcher):
    done = run_with(launcher, [(2, 2)], *GPU)
    assert done.returncode == 1
    assert "run1: Failed" in done.stderr


def test_restarts_are_counted(launcher):
    done = run_with(launcher, [(75, 75)] * 3, *GPU, "--restarts=2")
    assert done.returncode == 1
    assert "run1: Failed" in done.stderr


def test_a_jobset_for_each_seed(launcher):
    command = ["--", "bash", "-c", 'test "$0" != 3', "%a"]
    assert launcher.run(SCRIPT, "s", *GPU, "--seeds=0,1", *command).returncode == 0
    assert launcher.run(SCRIPT, "t", *GPU, "--seeds=2,3", *command).returncode == 1
    states = {path.stem: json.loads(path.read_text())["state"] for path in launcher.state.glob("jobset-*.json")}
    completed = dict.fromkeys(["jobset-s-0", "jobset-s-1", "jobset-t-2"], "Completed")
    assert states == completed | {"jobset-t-3": "Failed"}


def test_a_pod_of_tpus(launcher):
    [jobset] = rendered(launcher, "run1", *TPU, "--chips=8", "--slices=3", "--restarts=7", "--", "true")
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in jobset["metadata"]["annotations"]
    [job] = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"]) == (3, 1, 1)
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 120
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x2",
    }
    [container] = pod["containers"]
    assert container["image"] == "registry/image:1"
    assert container["resources"] == {"limits": {"google.com/tpu": "8"}}
    assert not any(variable["name"].startswith("JAX_") for variable in container["env"])
    assert [volume["name"] for volume in pod["volumes"]] == ["shared-memory"]


def test_a_pod_of_gpus(launcher):
    flags = ["--claim=my-claim", "--mount=/mnt/data", "--service-account=writer"]
    [jobset] = rendered(launcher, "run1", *GPU, *flags, "--", "true")
    assert "annotations" not in jobset["metadata"]
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert pod["serviceAccountName"] == "writer"
    [container] = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    assert container["volumeMounts"][1] == {"name": "data", "mountPath": "/mnt/data"}
    assert pod["volumes"][1] == {"name": "data", "persistentVolumeClaim": {"claimName": "my-claim"}}


def test_the_command_arrives_as_it_is(launcher):
    words = ["python", "-c", 'print("a\\n")\n# & ${image} 100%', "it's"]
    [jobset] = rendered(launcher, "run1", *GPU, "--", *words, "$(HOME)")
    [container] = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == [*words, "$$(HOME)"], "Kubernetes puts a variable for $(NAME), and $( for $$("


def test_dry_run_calls_nothing(launcher):
    done = launcher.run(SCRIPT, "--dry-run", "run1", *GPU, "--namespace=mine", "--", "true")
    assert "# to: kubectl --namespace=mine apply --filename=-" in done.stdout
    assert not launcher.calls("kubectl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: bash launch/gke.sh [--dry-run] NAME --image=IMAGE"),
        (["--image=i"], "usage: bash launch/gke.sh [--dry-run] NAME --image=IMAGE"),
        (["Run1", *GPU, "--", "true"], "NAME is Run1, but must be of lower-case letters"),
        (["run_1", *GPU, "--", "true"], "NAME is run_1, but must be of lower-case letters"),
        (["r", *GPU, "--hots=2", "--", "true"], "unknown argument --hots=2"),
        (["r", *GPU], "no command after --"),
        (["r", GPU[1], "--", "true"], "--image is missing"),
        (["r", TPU[0], "--", "true"], "--accelerator is missing"),
        (["r", *TPU[:2], "--", "true"], "--topology is missing: that of the TPU slice, e.g. 4x4"),
        (["r", *TPU[:2], "--topology=", "--", "true"], "--topology= has no value"),
        (["r", *TPU[:2], "--topology=4", "--", "true"], "--topology=4 must be that of a TPU slice, e.g. 4x4"),
        (["r", *TPU[:2], "--topology=0x4", "--", "true"], "--topology=0x4 must be that of a TPU slice, e.g. 4x4"),
        (["r", *TPU, "--hosts=2", "--", "true"], "--hosts is for GPUs: the number of TPU machines follows from"),
        (["r", *GPU, "--topology=4x2", "--", "true"], "--topology is for TPUs: the number of GPU machines is --hosts"),
        (["r", *TPU, "--chips=0", "--", "true"], "--chips=0 must be a positive whole number"),
        (["r", *TPU, "--chips=x", "--", "true"], "--chips=x must be a positive whole number"),
        (["r", *GPU, "--chips=-8", "--", "true"], "--chips=-8 must be a positive whole number"),
        (["r", *TPU, "--slices=two", "--", "true"], "--slices=two must be a positive whole number"),
        (["r", *GPU, "--hosts=0", "--", "true"], "--hosts=0 must be a positive whole number"),
        (["r", *GPU, "--restarts=-1", "--", "true"], "--restarts=-1 must be a whole number"),
        (["r", *TPU, "--chips=3", "--", "true"], "--chips=3 a machine don't divide the 8 of 4x2"),
        (["r", *GPU, "--slices=2", "--", "true"], "--slices is for TPUs: the number of GPU machines is --hosts"),
        (["r", *GPU, "--seeds=0,1", "--", "true"], "--seeds needs %a in the command"),
        (["r", *GPU, "--", "echo", "%a"], "%a in the command needs --seeds"),
        *(
            (["r", *GPU, f"--seeds={seeds}", "--", "echo", "%a"], f"--seeds={seeds} must be whole numbers")
            for seeds in ("0,,1", "0,", ",0", "0, 1", "0 1", "a", "-1")
        ),
        (["r", *GPU, "--", "x", "--workdir=runs/r"], "--workdir=runs/r would end with the pods: take gs://BUCKET/..."),
        (["r", *GPU, "--", "x", "--workdir", "/data/r"], "--workdir=/data/r would end with the pods"),
        (["r", *GPU, "--claim=c", "--", "x", "--workdir=/tmp/r"], "--workdir=/tmp/r would end with the pods"),
    ],
)
def test_usage(launcher, arguments, message):
    done = launcher.run(SCRIPT, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gke: {message}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--restarts=0", "--", "x", "--workdir=gs://bucket/r"],
        ["--claim=c", "--", "x", "--workdir=/data/r"],
        ["--claim=c", "--mount=/mnt/", "--", "x", "--workdir", "/mnt/r"],
    ],
)
def test_a_workdir_that_outlives_the_pods(launcher, arguments):
    [jobset] = rendered(launcher, "r", *GPU, *arguments)
    [container] = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == arguments[arguments.index("--") + 1 :]


@pytest.mark.slow
def test_two_processes_stop_at_one_step_and_go_on(launcher):
    terminate_one(launcher.state)
    python = ROOT / ".venv" / "bin" / "python"
    done = launcher.run(SCRIPT, "run1", *GPU, "--", python, PROBE, launcher.state, STAND_IN_PORT=free_port())
    assert done.returncode == 0, done.stdout + done.stderr
    check_probe(launcher.state)
    assert json.loads((launcher.state / "jobset-run1.json").read_text())["restarts"] == 1
