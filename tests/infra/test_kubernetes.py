"""infra/kubernetes: schemas, references and what must hold of every pod.

`kubectl kustomize` (or `kustomize build`) renders the overlays; where there is neither, the tests
of what is rendered are skipped. The fields of KubeRay's own kinds are typed from its sources
and parts of its API reference, names only.
"""

import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from pipelines import retrain, serve
from pipelines.base import defaults, identity
from pipelines.retraining import steps
from pipelines.serving import endpoint
from tests.options import options_of

FOLDER = Path(__file__).parents[2] / "infra/kubernetes"
KUBERNETES_VERSION = "1.32"
CLUSTERS = ("cpu", "gpu")
JOBS = ("cpu-job", "gpu-job")
POD = {"template"}  # checked with Kubernetes' own schema
FIELDS = {  # KubeRay: kind => fields it may have
    "RayClusterSpec": {
        *("authOptions", "suspend", "managedBy", "autoscalerOptions", "headServiceAnnotations"),
        *("enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec", "rayVersion"),
        "workerGroupSpecs",
    },
    "AuthOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "AutoscalerOptions": {
        *("resources", "image", "imagePullPolicy", "securityContext", "idleTimeoutSeconds"),
        *("upscalingMode", "version", "env", "envFrom", "volumeMounts"),
    },
    "HeadGroupSpec": {"headService", "enableIngress", "rayStartParams", "serviceType", *POD},
    "WorkerGroupSpec": {
        *("suspend", "groupName", "replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds"),
        *("rayStartParams", "scaleStrategy", "numOfHosts", *POD),
    },
    "RayJobSpec": {
        *("activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "submitterPodTemplate"),
        *("metadata", "clusterSelector", "submitterConfig", "managedBy", "deletionStrategy"),
        *("entrypoint", "runtimeEnvYAML", "jobId", "submissionMode", "entrypointResources"),
        *("entrypointNumCpus", "entrypointNumGpus", "ttlSecondsAfterFinished"),
        *("shutdownAfterJobFinishes", "suspend"),
    },
    "RayCronJobSpec": {"jobTemplate", "schedule", "suspend"},  # of 1.6, where it is alpha
}


def render(folder: Path) -> list[dict[str, Any]]:
    """The manifests that `kubectl apply -k` would send."""
    if kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize", folder]
    elif kustomize := shutil.which("kustomize"):
        command = [kustomize, "build", folder]
    else:
        pytest.skip("needs kubectl or kustomize")
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(YAML(typ="safe").load_all(text))


@pytest.fixture(params=[*CLUSTERS, *JOBS])
def manifests(request) -> list[dict[str, Any]]:
    return render(FOLDER / "overlays" / request.param)


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def cluster_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The specification of the Ray cluster, be it of its own or of a job."""
    specifications = {
        manifest["kind"]: manifest["spec"]
        for manifest in manifests
        if manifest["apiVersion"] == "ray.io/v1"
    }
    ((kind, specification),) = specifications.items()
    found: dict[str, Any] = specification["rayClusterSpec"] if kind == "RayJob" else specification
    return found


def pods_of(manifests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The templates of all pods: head, workers and what submits a job."""
    cluster = cluster_of(manifests)
    yield cluster["headGroupSpec"]["template"]
    yield from (group["template"] for group in cluster["workerGroupSpecs"])
    for manifest in manifests:
        if manifest["kind"] == "RayJob":
            yield manifest["spec"]["submitterPodTemplate"]


def unknown_fields(manifests: list[dict[str, Any]]) -> set[str]:
    """Fields that KubeRay does not know."""
    cluster = cluster_of(manifests)
    parts = [
        ("RayClusterSpec", cluster),
        ("AuthOptions", cluster["authOptions"]),
        ("AutoscalerOptions", cluster["autoscalerOptions"]),
        ("HeadGroupSpec", cluster["headGroupSpec"]),
        *(("WorkerGroupSpec", group) for group in cluster["workerGroupSpecs"]),
        *(("RayJobSpec", job["spec"]) for job in manifests if job["kind"] == "RayJob"),
    ]
    return {f"{kind}.{field}" for kind, part in parts for field in part.keys() - FIELDS[kind]}


def test_manifests_are_as_the_schemas_of_kubernetes_say(manifests):
    for manifest in manifests:
        if manifest["apiVersion"] != "ray.io/v1":
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    for template in pods_of(manifests):
        pod = {"apiVersion": "v1", "kind": "Pod", **template}
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


def test_a_misspelt_field_of_a_pod_is_noticed():
    pod = {"apiVersion": "v1", "kind": "Pod", "spec": {"containers": [], "tolerationz": []}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)


def test_kuberay_knows_every_field(manifests):
    assert unknown_fields(manifests) == set()
    cluster_of(manifests)["autoscalerOptions"]["idleTimeout"] = 60
    assert unknown_fields(manifests) == {"AutoscalerOptions.idleTimeout"}


def test_ray_has_the_version_of_the_lock_and_demands_a_token(manifests):
    cluster = cluster_of(manifests)
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}


def test_the_cluster_grows_and_shrinks(manifests):
    cluster = cluster_of(manifests)
    assert cluster["enableInTreeAutoscaling"] is True
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["minReplicas"] == 0 < workers["maxReplicas"]


def test_containers_have_no_more_rights_than_their_user(manifests):
    containers = []
    for template in pods_of(manifests):
        rights = template["spec"]["securityContext"]
        assert rights["runAsNonRoot"] is True
        assert rights["seccompProfile"] == {"type": "RuntimeDefault"}
        containers += template["spec"]["containers"]
    for container in [*containers, cluster_of(manifests)["autoscalerOptions"]]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"].keys() == {"requests", "limits"}
    enforced = of_kind(manifests, "Namespace")["metadata"]["labels"]
    assert enforced == {"pod-security.kubernetes.io/enforce": "restricted"}


def test_only_the_pod_with_the_autoscaler_may_talk_to_kubernetes(manifests):
    head, *others = (template["spec"] for template in pods_of(manifests))
    assert head["automountServiceAccountToken"] is True
    assert [pod["automountServiceAccountToken"] for pod in others] == [False] * len(others)


def test_secrets_are_referred_to_and_not_contained(manifests):
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    head, workers = (template["spec"] for template in list(pods_of(manifests))[:2])
    for pod in (head, workers):
        assert {"secretRef": {"name": "aegan-credentials"}} in pod["containers"][0]["envFrom"]


def test_settings_that_pods_refer_to_are_there(manifests):
    settings = of_kind(manifests, "ConfigMap")
    assert settings["metadata"]["name"] == "aegan"
    assert "DVC_REMOTE_URL" in settings["data"]
    account = of_kind(manifests, "ServiceAccount")["metadata"]["name"]
    head = cluster_of(manifests)["headGroupSpec"]["template"]["spec"]
    assert head["serviceAccountName"] == account
    assert {"configMapRef": {"name": "aegan"}} in head["containers"][0]["envFrom"]


def test_everything_is_in_one_namespace(manifests):
    namespaced = [manifest for manifest in manifests if manifest["kind"] != "Namespace"]
    assert {manifest["metadata"]["namespace"] for manifest in namespaced} == {"aegan"}


def test_images_have_a_tag(manifests):
    images = {c["image"] for pod in pods_of(manifests) for c in pod["spec"]["containers"]}
    (image,) = images  # one and the same
    assert image.endswith((":cpu", ":cuda"))


def test_nothing_comes_in_or_goes_out_unless_a_rule_says_so(manifests):
    policies = {m["metadata"]["name"]: m["spec"] for m in manifests if m["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    own = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "aegan"}}}
    from_cluster, *from_elsewhere = policies["ray"]["ingress"]
    assert from_cluster == {"from": [own]}
    assert [rule["ports"] for rule in from_elsewhere] == [[{"port": 8265}], [{"port": 8080}]]
    assert all("namespaceSelector" in peer for rule in from_elsewhere for peer in rule["from"])
    (outside,) = (
        p["ipBlock"] for r in policies["ray"]["egress"] for p in r["to"] if "ipBlock" in p
    )
    assert outside["except"] == ["169.254.0.0/16"]  # instance metadata: the node's credentials


def test_network_policy_and_disruption_budget_concern_the_pods(manifests):
    labels = [template["metadata"]["labels"] for template in pods_of(manifests)]
    assert labels == [{"app.kubernetes.io/name": "aegan"}] * len(labels)
    budget = of_kind(manifests, "PodDisruptionBudget")["spec"]
    by_kuberay = {"ray.io/node-type": "head"}
    assert budget["selector"]["matchLabels"] == labels[0] | by_kuberay
    assert budget.keys() == {"minAvailable", "selector"}


@pytest.mark.parametrize("overlay", JOBS)
def test_a_job_brings_its_own_cluster_and_ends(overlay):
    manifests = render(FOLDER / "overlays" / overlay)
    assert "RayCluster" not in {manifest["kind"] for manifest in manifests}
    cluster = render(FOLDER / "overlays" / overlay.removesuffix("-job"))
    job = of_kind(manifests, "RayJob")["spec"]
    assert job["rayClusterSpec"] == of_kind(cluster, "RayCluster")["spec"]
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] > 0 < job["activeDeadlineSeconds"]
    python, option, module = job["entrypoint"].split()
    assert (python, option) == ("python", "-m")
    assert identity.file_of(module) is not None


def test_gpu_workers_ask_for_one_gpu():
    (workers,) = cluster_of(render(FOLDER / "overlays/gpu"))["workerGroupSpecs"]
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("kustomization.yaml")), ids=str)
def test_files_that_a_kustomization_names_are_there(file):
    content = YAML(typ="safe").load(file.read_text())
    named = [*content.get("resources", []), *content.get("components", [])]
    named += [patch["path"] for patch in content.get("patches", []) if "path" in patch]
    named += [name for maker in content.get("configMapGenerator", []) for name in maker["envs"]]
    assert [name for name in named if not (file.parent / name).exists()] == []


SERVING = {file.stem: YAML(typ="safe").load(file) for file in (FOLDER / "serving").glob("*.yaml")}


def test_serving_is_as_the_schemas_of_kubernetes_say():
    for name in ("deployment", "service", "networkpolicy"):
        kubernetes_validate.validate(SERVING[name], KUBERNETES_VERSION, strict=True)
    assert {f"{name}.yaml" for name in SERVING} == {
        "kustomization.yaml",
        *SERVING["kustomization"]["resources"],
    }


def test_a_serving_pod_has_no_more_rights_than_its_user_needs():
    pod = SERVING["deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_probes_ask_what_the_server_answers_and_its_end_is_waited_for():
    template = SERVING["deployment"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in endpoint.METHODS
    assert container["ports"] == [{"name": "http", "containerPort": defaults.PORT}]
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert template["spec"]["terminationGracePeriodSeconds"] > serve.END_SECONDS + wait
    given = options_of("serve", container["args"])
    assert given["name"] == [SERVING["service"]["metadata"]["name"]]  # by which clients call it


def test_the_service_and_the_policy_concern_the_serving_pods():
    labels = SERVING["deployment"]["spec"]["template"]["metadata"]["labels"]
    assert SERVING["deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert SERVING["service"]["spec"]["selector"] == labels
    assert SERVING["networkpolicy"]["spec"]["podSelector"]["matchLabels"] == labels


RETRAIN = {file.stem: YAML(typ="safe").load(file) for file in (FOLDER / "retrain").glob("*.yaml")}


def test_retraining_is_as_the_schemas_of_kubernetes_say():
    for name in ("cronjob", "volume"):
        kubernetes_validate.validate(RETRAIN[name], KUBERNETES_VERSION, strict=True)
    assert set(RETRAIN["kustomization"]["resources"]) == {"cronjob.yaml", "volume.yaml"}


def test_the_ray_cron_job_is_one_that_kuberay_and_kubernetes_know():
    manifest, cron = RETRAIN["raycronjob"], RETRAIN["raycronjob"]["spec"]
    assert manifest["apiVersion"] == "ray.io/v1"
    assert cron.keys() <= FIELDS["RayCronJobSpec"]
    job = cron["jobTemplate"]
    assert job.keys() <= FIELDS["RayJobSpec"]
    cluster = job["rayClusterSpec"]
    assert cluster.keys() <= FIELDS["RayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    for kind, group in (("HeadGroupSpec", cluster["headGroupSpec"]), ("WorkerGroupSpec", workers)):
        assert group.keys() <= FIELDS[kind]
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES_VERSION, strict=True)
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in (*spec.get("initContainers", []), *spec["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"].keys() == {"requests", "limits"}
    claim = cluster["headGroupSpec"]["template"]["spec"]["volumes"][0]["persistentVolumeClaim"]
    assert claim["claimName"] == RETRAIN["volume"]["metadata"]["name"]
    assert RETRAIN["cronjob"]["spec"]["schedule"] == cron["schedule"]


def test_one_retraining_runs_at_a_time_with_no_more_rights_than_it_needs():
    spec = RETRAIN["cronjob"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["timeZone"]
    assert spec["schedule"].split()[0] not in ("0", "*")
    job = spec["jobTemplate"]["spec"]
    assert job["activeDeadlineSeconds"] > 0
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == sorted({*steps.EXIT_CODES.values(), retrain.BUSY} - {0})
    pod = job["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in (*pod["initContainers"], *pod["containers"]):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]


def test_the_project_is_cloned_beside_what_a_new_disk_holds_and_pulled_after(tmp_path, monkeypatch):
    pods = (
        RETRAIN["cronjob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"],
        RETRAIN["raycronjob"]["spec"]["jobTemplate"]["rayClusterSpec"]["headGroupSpec"]["template"][
            "spec"
        ],
    )
    origin = tmp_path / "origin"
    subprocess.run(["git", "init", "--quiet", origin], check=True)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet"]
    monkeypatch.setenv("PROJECT", str(origin))
    for number, pod in enumerate(pods):
        [container] = pod["initContainers"]
        volume = tmp_path / f"volume-{number}"
        (volume / "lost+found").mkdir(parents=True)
        for message in ("one", "two"):
            subprocess.run([*commit, "--allow-empty", "-m", message], cwd=origin, check=True)
            command = [*container["command"], *container["args"]]
            subprocess.run(command, cwd=volume, check=True)
            head = subprocess.check_output(
                ["git", "log", "-1", "--format=%s"], cwd=volume / "aegan", text=True
            )
            assert head.strip() == message
    assert pods[0]["containers"][0]["workingDir"] == "/project/aegan"
    assert "cd /project/aegan &&" in RETRAIN["raycronjob"]["spec"]["jobTemplate"]["entrypoint"]
