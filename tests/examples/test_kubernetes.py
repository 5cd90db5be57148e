"""The Kubernetes jobs by schemas that aren't ours, of Kubernetes and of Kubeflow; an unknown key is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
from kubeflow.training import models

from tests.examples.test_cluster import FOLDER, documents, pods

KUBEFLOW = FOLDER / "pytorchjob.yaml"


def errors_of_kubernetes(found: dict[str, Any]) -> list[str]:
    try:
        kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def errors_of_kubeflow(found: object, kind: str, where: str) -> Iterator[str]:
    """Keys that a type of Kubeflow's client doesn't have, and values of another type. Kubernetes' own types are left
    to its schemas."""
    if inside := re.fullmatch(r"dict\(str, (.+)\)", kind):
        assert isinstance(found, dict)
        for name, value in found.items():
            yield from errors_of_kubeflow(value, inside.group(1), f"{where}.{name}")
    elif kind.startswith("KubeflowOrg"):
        assert isinstance(found, dict)
        model = getattr(models, kind)
        names = {key: name for name, key in model.attribute_map.items()}
        for key, value in found.items():
            if key not in names:
                yield f"{where}: {kind} has no `{key}`"
            else:
                yield from errors_of_kubeflow(value, model.openapi_types[names[key]], f"{where}.{key}")
    elif kind in ("str", "int", "bool") and type(found).__name__ != kind:
        yield f"{where}: {found!r} is no {kind}"


def test_the_job_and_its_service_are_what_kubernetes_takes() -> None:
    for found in documents(FOLDER / "job.yaml"):
        assert errors_of_kubernetes(found) == []


def test_the_pytorchjob_is_what_kubeflow_takes_and_its_pods_what_kubernetes_does() -> None:
    (job,) = documents(KUBEFLOW)
    assert list(errors_of_kubeflow(job, "KubeflowOrgV1PyTorchJob", "job")) == []
    for _, pod in pods(KUBEFLOW):
        assert errors_of_kubernetes(pod_of(pod)) == []


def pod_of(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker"}, "spec": spec}


def test_a_misspelt_key_or_a_wrong_type_is_found_wherever_it_is() -> None:
    _, job = documents(FOLDER / "job.yaml")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container["resorces"] = container.pop("resources")
    assert "'resorces' was unexpected" in errors_of_kubernetes(job)[0]
    _, job = documents(FOLDER / "job.yaml")
    job["spec"]["completions"] = "two"
    assert "spec.completions" in errors_of_kubernetes(job)[0]

    (job,) = documents(KUBEFLOW)
    job["spec"]["nprocPerNode"] = 8
    job["spec"]["elasticPolicy"]["rdzvBackends"] = "c10d"
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["replica"] = 2
    assert list(errors_of_kubeflow(job, "KubeflowOrgV1PyTorchJob", "job")) == [
        "job.spec.nprocPerNode: 8 is no str",
        "job.spec.elasticPolicy: KubeflowOrgV1ElasticPolicy has no `rdzvBackends`",
        "job.spec.pytorchReplicaSpecs.Worker: KubeflowOrgV1ReplicaSpec has no `replica`",
    ]
    ((_, pod),) = pods(KUBEFLOW)
    pod["containers"][0]["volumeMount"] = []
    assert errors_of_kubernetes(pod_of(pod))
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        errors_of_kubernetes({"apiVersion": "batch/v9", "kind": "Job"})
