"""The Kubernetes objects of launch/kubernetes are well-formed and agree with themselves and with the project.

By schema only: no cluster runs them here.
"""

import copy
import re
from importlib import metadata

import jsonschema
import pytest
import yaml
from kubernetes_schemas import PYTORCH_JOB, RAY_CLUSTER
from launching import ROOT

FOLDER = ROOT / "launch" / "kubernetes"
SCHEMAS = {"pytorchjob.yaml": PYTORCH_JOB, "raycluster.yaml": RAY_CLUSTER}


def read(name):
    return yaml.safe_load((FOLDER / name).read_text())


def pods(name, content):
    spec = content["spec"]
    if name == "pytorchjob.yaml":
        return [spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]]
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_every_file_has_a_schema():
    assert {path.name for path in FOLDER.iterdir()} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_object_has_the_fields_of_its_kind(name):
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    jsonschema.validate(read(name), SCHEMAS[name])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda job: job["spec"].update(nprocPerNode=8),  # a string in this API
        lambda job: job["spec"].update(nProcPerNode="8"),  # misspelt
        lambda job: job["spec"]["runPolicy"].update(cleanPodPolicy="running"),
        lambda job: job["spec"]["pytorchReplicaSpecs"]["Worker"].pop("template"),
    ],
)
def test_schema_finds_what_an_operator_would_refuse(spoil):
    job = copy.deepcopy(read("pytorchjob.yaml"))
    spoil(job)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, PYTORCH_JOB)


@pytest.mark.parametrize("name", SCHEMAS)
def test_pods_mount_what_they_declare_and_run_as_the_image_does(name):
    user = int(re.search(r"useradd .*--uid (\d+)", (ROOT / "Dockerfile").read_text())[1])
    for pod in pods(name, read(name)):
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert pod["securityContext"]["runAsUser"] == user
        for container in pod["containers"]:
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert set(mounts) == volumes
            assert container["workingDir"] == mounts["workspace"] == "/workspace"


def test_pytorch_job_counts_agree():
    spec = read("pytorchjob.yaml")["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    (container,) = worker["template"]["spec"]["containers"]
    assert container["name"] == "pytorch"
    assert str(container["resources"]["limits"]["nvidia.com/gpu"]) == spec["nprocPerNode"]
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] == elastic["maxReplicas"]
    # Code 75 means saved, start me again; ExitCode would take it for the end.
    assert worker["restartPolicy"] == "OnFailure"
    grace = next(word for word in container["command"] if word.startswith("--shutdown-timeout="))
    assert int(grace.partition("=")[2]) < worker["template"]["spec"]["terminationGracePeriodSeconds"]


def test_pytorch_job_trains_with_settings_that_are_valid(tmp_path):
    from spikescale.config import load_config

    (container,) = pods("pytorchjob.yaml", read("pytorchjob.yaml"))[0]["containers"]
    assert container["args"][0] == "--config"
    path = container["args"][1].replace("/opt/spikescale", str(ROOT))
    config = load_config(path, container["args"][2:])
    ranks = 64 // (config.parallel.tensor * config.parallel.context)
    assert config.train.batch_size % ranks == 0


def test_ray_cluster_runs_the_ray_that_is_installed():
    assert read("raycluster.yaml")["spec"]["rayVersion"] == metadata.version("ray")
