"""kubectl apply | get jobset | get pods | logs, and the cluster as far as need be: JobSet, Job, kubelet, GKE's webhook.

A JobSet runs while somebody looks at its logs. The names of pods stand in for addresses; here all are this machine.
"""

import json
import os
import sys

import yaml
from recording import STATE, as_shell, option, record, run_all

arguments = record("kubectl")
arguments = [each for each in arguments if not each.startswith("--namespace=")]


def pods(jobset):
    """Each pod's command and environment."""
    name = jobset["metadata"]["name"]
    for job in jobset["spec"]["replicatedJobs"]:
        for job_index in range(int(job["replicas"])):
            spec = job["template"]["spec"]
            assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
            hosts = [f"{name}-{job['name']}-{job_index}-{i}.{name}" for i in range(spec["parallelism"])]
            for index in range(spec["parallelism"]):
                yield pod(spec["template"]["spec"], hosts, index, job_index, job["replicas"])


def pod(spec, hosts, index, job_index, jobs):
    [container] = spec["containers"]
    annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
    env = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": hosts[index].split(".")[0]}
    env |= {"JOB_COMPLETION_INDEX": str(index)}
    for each in container["env"]:
        if "value" in each:
            assert isinstance(each["value"], str), f"the API refuses {each}"
            env[each["name"]] = each["value"]
        else:
            path = each["valueFrom"]["fieldRef"]["fieldPath"]
            env[each["name"]] = annotations[path.removeprefix("metadata.annotations['").removesuffix("']")]
    if "google.com/tpu" in container["resources"]["limits"]:
        env |= {"TPU_WORKER_ID": str(index), "TPU_WORKER_HOSTNAMES": ",".join(hosts)}
        if jobs > 1:
            first = hosts[0].replace(f"-{job_index}-0.", "-0-0.")
            env |= {"MEGASCALE_NUM_SLICES": str(jobs), "MEGASCALE_SLICE_ID": str(job_index)}
            env |= {"MEGASCALE_COORDINATOR_ADDRESS": first}
    return container["command"], env


def at_home(env):
    """The pod's environment, every pod's name being this machine's: the first one's port is free."""
    host, _, _ = env.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")
    changed = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{os.environ.get('STAND_IN_PORT', 1)}"} if host else {}
    return os.environ | env | changed


def reason(job, statuses):
    """Why the Job fails: its podFailurePolicy, or that a pod has failed at all."""
    [rule] = job["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "In"
    first = next(status for status in statuses if status)
    return "PodFailurePolicy" if first in rule["onExitCodes"]["values"] else "BackoffLimitExceeded"


def run(jobset, memory):
    """Runs all pods once, and sets the state, or counts a restart."""
    all_pods = list(pods(jobset))
    (STATE / "pods.json").write_text(json.dumps([env for _, env in all_pods]))
    statuses = run_all([(command, at_home(env), STATE) for command, env in all_pods])
    statuses = [as_shell(status) for status in statuses]
    [job] = jobset["spec"]["replicatedJobs"]
    policy = jobset["spec"]["failurePolicy"]
    if not any(statuses):
        memory["state"] = "Completed"
        return
    actions = [rule["action"] for rule in policy["rules"] if reason(job, statuses) in rule["onJobFailureReasons"]]
    memory["restarts"] += 1
    if actions == ["FailJobSet"] or memory["restarts"] > policy["maxRestarts"]:
        memory["state"] = "Failed"


def remembered(name):
    return STATE / f"jobset-{name}.json"


if arguments[0] == "apply":
    assert "--filename=-" in arguments
    [jobset] = yaml.safe_load_all(sys.stdin)
    file = remembered(jobset["metadata"]["name"])
    if not file.exists():
        file.write_text(json.dumps({"jobset": jobset, "state": "", "restarts": 0}))
elif arguments[:2] == ["get", "jobset"]:
    assert option(arguments, "output") == "jsonpath={.status.terminalState}"
    print(json.loads(remembered(arguments[2]).read_text())["state"], end="")
elif arguments[:2] == ["get", "pods"]:
    assert option(arguments, "output") == "jsonpath={.items[0].metadata.name}"
    selected = dict(each.split("=") for each in option(arguments, "selector").split(","))
    assert selected["jobset.sigs.k8s.io/job-index"] == selected["batch.kubernetes.io/job-completion-index"] == "0"
    name = selected["jobset.sigs.k8s.io/jobset-name"]
    restarts = json.loads(remembered(name).read_text())["restarts"]
    print(f"{name}-workers-0-0-{restarts:05}", end="")  # the last part is new with every pod
elif arguments[0] == "logs":
    file = remembered(arguments[-1].rsplit("-workers-0-0-", 1)[0])
    memory = json.loads(file.read_text())
    run(memory["jobset"], memory)
    file.write_text(json.dumps(memory))
else:
    sys.exit(f"no such verb: {arguments[0]}")
