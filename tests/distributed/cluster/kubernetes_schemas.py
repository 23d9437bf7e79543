"""JSON schemas of the Kubernetes objects in launch/kubernetes: the fields that they use, no others.

Names, types and allowed values are those of the definitions that the operators install: PyTorchJob of
kubeflow/training-operator (kubeflow.org/v1), RayCluster of ray-project/kuberay (ray.io/v1), and pods of
Kubernetes (v1).
A field that is not listed here is refused, so that a misspelt one is found.
"""

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
QUANTITY: Schema = {
    "anyOf": [POSITIVE, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|[KMGTPE]i?)?$"}]
}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def record(required: str = "", **fields: Schema) -> Schema:
    """An object of these fields and no others; `required` are the names of those it must have."""
    return {
        "type": "object",
        "properties": fields,
        "required": required.split(),
        "additionalProperties": False,
    }


def several(item: Schema, at_least: int = 0) -> Schema:
    """A list of `item`."""
    return {"type": "array", "items": item, "minItems": at_least}


def mapping(value: Schema) -> Schema:
    """An object of any names with values of one kind."""
    return {"type": "object", "additionalProperties": value}


PROBE = record(
    tcpSocket=record("port", port=PORT),
    initialDelaySeconds=COUNT,
    periodSeconds=POSITIVE,
    failureThreshold=POSITIVE,
)
CONTAINER = record(
    "name image",
    name=NAME,
    image=TEXT,
    workingDir={"type": "string", "pattern": "^/"},
    command=several(TEXT, 1),
    args=several(TEXT),
    resources=record(limits=mapping(QUANTITY), requests=mapping(QUANTITY)),
    volumeMounts=several(record("name mountPath", name=NAME, mountPath={"type": "string", "pattern": "^/"})),
    livenessProbe=PROBE,
    readinessProbe=PROBE,
)
VOLUME = {
    **record(
        "name",
        name=NAME,
        persistentVolumeClaim=record("claimName", claimName=NAME),
        emptyDir=record(medium={"enum": ["", "Memory"]}, sizeLimit=QUANTITY),
    ),
    "minProperties": 2,  # a name and one kind of storage
    "maxProperties": 2,
}
POD_TEMPLATE = record(
    "spec",
    spec=record(
        "containers",
        terminationGracePeriodSeconds=COUNT,
        securityContext=record(runAsNonRoot={"type": "boolean"}, runAsUser=POSITIVE, fsGroup=POSITIVE),
        containers=several(CONTAINER, 1),
        volumes=several(VOLUME),
    ),
)
PYTORCH_JOB = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "kubeflow.org/v1"},
    kind={"const": "PyTorchJob"},
    metadata=record("name", name=NAME),
    spec=record(
        "pytorchReplicaSpecs",
        nprocPerNode={"type": "string", "pattern": "^(auto|cpu|gpu|[1-9][0-9]*)$"},
        elasticPolicy=record(
            rdzvBackend={"enum": ["c10d", "etcd", "etcd-v2"]},
            minReplicas=POSITIVE,
            maxReplicas=POSITIVE,
            maxRestarts=COUNT,
        ),
        runPolicy=record(cleanPodPolicy={"enum": ["All", "Running", "None"]}, backoffLimit=COUNT),
        pytorchReplicaSpecs=record(
            "Worker",
            Worker=record(
                "template",
                replicas=POSITIVE,
                restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
                template=POD_TEMPLATE,
            ),
        ),
    ),
)
RAY_CLUSTER = record(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayCluster"},
    metadata=record("name", name=NAME),
    spec=record(
        "headGroupSpec",
        rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        headGroupSpec=record("template", rayStartParams=mapping({"type": "string"}), template=POD_TEMPLATE),
        workerGroupSpecs=several(
            record(
                "groupName template",
                groupName=NAME,
                replicas=COUNT,
                minReplicas=COUNT,
                maxReplicas=COUNT,
                rayStartParams=mapping({"type": "string"}),
                template=POD_TEMPLATE,
            )
        ),
    ),
)
