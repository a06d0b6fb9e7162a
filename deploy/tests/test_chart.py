"""The chart renders, says what it must say, and refuses what it doesn't know."""

from __future__ import annotations

import copy
import importlib.util
import io
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from chassis.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/care-coordinator"
SERVICES = {"patients", "scheduling", "referrals", "notifications", "feedback"}
TENANT = "0190a5c0-0000-7000-8000-000000000001"
NEEDED = {
    "kafka": {"bootstrap": "kafka:9092"},
    "issuers": [{"issuer": "https://login.example.org", "tenants": {"north": TENANT}}],
    "publicUrl": "https://care.example.org",
}

Document = dict[str, Any]


@pytest.fixture(scope="session")
def helm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A helm binary: CARE_HELM, the machine's, or the one that lies in a wheel among the development dependencies."""
    found = os.environ.get("CARE_HELM") or shutil.which("helm")
    if found:
        return Path(found)
    spec = importlib.util.find_spec("aws_cdk")
    assert spec and spec.submodule_search_locations, "no helm on this machine: make setup"
    archive = next(Path(next(iter(spec.submodule_search_locations))).glob("lambda_layer_kubectl_*/_jsii/*.tgz"))
    target = tmp_path_factory.mktemp("helm") / "helm"
    with tarfile.open(archive) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer
        with zipfile.ZipFile(io.BytesIO(layer.read())) as binaries:
            target.write_bytes(binaries.read("helm/helm"))
    target.chmod(0o755)
    return target


class Refused(Exception):
    """What helm said when it did not render."""


class Chart:
    """Renders the chart with values laid over the needed ones."""

    def __init__(self, helm: Path, folder: Path, chart: Path = CHART) -> None:
        self.helm, self.folder, self.chart = helm, folder, chart

    def text(self, values: Document | None = None, needed: Document = NEEDED) -> str:
        path = self.folder / "values.yaml"
        path.write_text(yaml.safe_dump(merged(needed, values or {})))
        command = [self.helm, "template", "care", self.chart, "--namespace", "care", "--values", path]
        home = {"HOME": str(self.folder), "PATH": os.environ["PATH"]}
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, env=home)
        if outcome.returncode:
            raise Refused(outcome.stderr)
        return outcome.stdout

    def documents(self, values: Document | None = None) -> list[Document]:
        return [document for document in yaml.safe_load_all(self.text(values)) if document]


def merged(base: Document, over: Document) -> Document:
    result = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


@pytest.fixture
def chart(helm: Path, tmp_path: Path) -> Chart:
    return Chart(helm, tmp_path)


@pytest.fixture(scope="session")
def documents(helm: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Document]:
    return Chart(helm, tmp_path_factory.mktemp("chart")).documents()


EVERYTHING: Document = {
    "global": {"imageRegistry": "registry.example.org/care", "imagePullSecrets": ["pull"], "anything": {"a": 1}},
    "kafka": {
        "tls": {"enabled": True, "existingSecret": "kafka-tls", "clientCertificate": True},
        "sasl": {"mechanism": "SCRAM-SHA-512", "existingSecret": "kafka-sasl"},
    },
    "telemetry": {"otlpEndpoint": "http://collector:4318", "resourceAttributes": {"deployment.environment": "test"}},
    "services": {
        "gateway": {"digest": "sha256:" + "a" * 64, "priorityClassName": "high"},
        "patients": {"env": {"CARE_X": 1}, "database": {"to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}]}},
    },
    "env": {"TZ": "UTC"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "a", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "podAnnotations": {"reloader.stakater.com/auto": "true"},
    "serviceAccount": {"annotations": {"a": "b"}},
    "networkPolicy": {
        "gatewayFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
        "kafka": {"to": [{"ipBlock": {"cidr": "10.0.0.2/32"}}]},
    },
    "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "care-tls", "annotations": {"a": "b"}},
}


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    return {d["metadata"]["labels"]["app.kubernetes.io/component"]: d for d in documents if d["kind"] == kind}


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for document in documents:
        if document["kind"] in ("Deployment", "Job"):
            yield f"{document['kind']} {document['metadata']['name']}", document["spec"]["template"]["spec"]


@pytest.mark.parametrize("version", [*(pytest.param(old, marks=pytest.mark.slow) for old in ("1.31", "1.33")), "1.35"])
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_every_document_is_valid_for_the_cluster(chart: Chart, version: str, values: Document) -> None:
    rendered = chart.documents(values)
    assert len(rendered) > 30
    for document in rendered:
        kubernetes_validate.validate(document, version, strict=True)


def test_there_are_six_workloads_each_with_its_service_account_budget_and_policy(documents: list[Document]) -> None:
    for kind in ("Deployment", "Service", "ServiceAccount", "PodDisruptionBudget"):
        assert set(of_kind(documents, kind)) == SERVICES | {"gateway"}, kind
    policies = set(of_kind(documents, "NetworkPolicy"))
    assert policies == SERVICES | {"gateway"} | {f"{name}-migrations" for name in SERVICES}
    assert set(of_kind(documents, "Job")) == {f"{name}-migrations" for name in SERVICES}


def test_rendering_twice_gives_the_same_text(chart: Chart) -> None:
    assert chart.text(EVERYTHING) == chart.text(EVERYTHING)
    for template in (CHART / "templates").iterdir():
        assert not re.search(r"\b(lookup|rand\w+|genCA|genSelfSignedCert|uuidv4|now)\b", template.read_text()), template


def test_every_container_obeys_the_restricted_pod_standard(documents: list[Document]) -> None:
    for name, pod in pods(documents):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] == 10001, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod), name
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            assert "memory" in container["resources"]["limits"], name
            assert "cpu" not in container["resources"]["limits"], name
            assert set(container["resources"]["requests"]) == {"cpu", "memory"}, name
            assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"], name


def test_service_accounts_carry_no_token_and_there_is_no_rbac(documents: list[Document]) -> None:
    assert all(
        account["automountServiceAccountToken"] is False for account in of_kind(documents, "ServiceAccount").values()
    )
    assert not [
        d for d in documents if d["kind"] in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding", "Secret")
    ]


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_grpc_service_is_headless_and_probed_on_its_plaintext_health_port(
    documents: list[Document], name: str
) -> None:
    assert of_kind(documents, "Service")[name]["spec"]["clusterIP"] == "None"
    [container] = of_kind(documents, "Deployment")[name]["spec"]["template"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["grpc"]["port"] == 50052
    assert container["livenessProbe"]["grpc"] != container["readinessProbe"]["grpc"]
    assert {port["containerPort"] for port in container["ports"]} == {50051, 50052, 9464}


def test_the_gateway_is_probed_by_http(documents: list[Document]) -> None:
    [container] = of_kind(documents, "Deployment")["gateway"]["spec"]["template"]["spec"]["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert {port["containerPort"] for port in container["ports"]} == {8080, 9464}
    assert not any(variable["name"] == "CARE_DATABASE_URL" for variable in container["env"])


def test_a_pod_is_unready_before_it_is_told_to_stop_and_drains_within_its_grace(documents: list[Document]) -> None:
    for name, deployment in of_kind(documents, "Deployment").items():
        pod = deployment["spec"]["template"]["spec"]
        [container] = pod["containers"]
        pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain = int(next(v["value"] for v in container["env"] if v["name"] == "CARE_DRAIN_TIMEOUT"))
        assert pause + drain + 5 == pod["terminationGracePeriodSeconds"], name
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_migration_needs_nothing_of_the_release(documents: list[Document], name: str) -> None:
    job = of_kind(documents, "Job")[f"{name}-migrations"]
    assert job["spec"]["backoffLimit"] == 0
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert "hook-failed" not in job["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
    pod = job["spec"]["template"]["spec"]
    assert "serviceAccountName" not in pod
    [container] = pod["containers"]
    assert container["args"] == ["migrate"]
    assert {variable["name"] for variable in container["env"]} == {"CARE_ENVIRONMENT", "CARE_DATABASE_URL"}
    policy = of_kind(documents, "NetworkPolicy")[f"{name}-migrations"]["metadata"]["annotations"]
    assert int(policy["helm.sh/hook-weight"]) < int(job["metadata"]["annotations"]["helm.sh/hook-weight"])


def test_migrations_may_have_an_owner_of_their_own(chart: Chart) -> None:
    values = {"services": {"patients": {"database": {"migrations": {"existingSecret": "patients-owner"}}}}}
    rendered = chart.documents(values)

    def secret(document: Document) -> str:
        env = document["spec"]["template"]["spec"]["containers"][0]["env"]
        url = next(v for v in env if v["name"] == "CARE_DATABASE_URL")
        return str(url["valueFrom"]["secretKeyRef"]["name"])

    assert secret(of_kind(rendered, "Job")["patients-migrations"]) == "patients-owner"
    assert secret(of_kind(rendered, "Deployment")["patients"]) == "care-patients-database"
    assert secret(of_kind(rendered, "Job")["feedback-migrations"]) == "care-feedback-database"


def test_migrations_can_be_run_by_someone_else(chart: Chart) -> None:
    rendered = chart.documents({"migrations": {"mode": "external"}})
    assert not of_kind(rendered, "Job")
    assert set(of_kind(rendered, "NetworkPolicy")) == SERVICES | {"gateway"}


def test_only_callers_reach_a_service_and_nobody_reaches_anothers_database(chart: Chart) -> None:
    peers = {n: [{"ipBlock": {"cidr": f"10.1.0.{i}/32"}}] for i, n in enumerate(sorted(SERVICES), 1)}
    rendered = chart.documents({"services": {n: {"database": {"to": to}} for n, to in peers.items()}})
    values = yaml.safe_load((CHART / "values.yaml").read_text())["services"]
    policies = of_kind(rendered, "NetworkPolicy")
    for name in SERVICES | {"gateway"}:
        spec = policies[name]["spec"]
        assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
        reached = {
            peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
            for rule in spec["egress"]
            for peer in rule.get("to", [])
            if "podSelector" in peer
        }
        assert reached == set(values[name]["calls"]), name
        databases = [rule["to"] for rule in spec["egress"] if {"port": 5432, "protocol": "TCP"} in rule["ports"]]
        assert databases == ([peers[name]] if name in SERVICES else []), name
    for name in SERVICES:
        allowed = {
            peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
            for rule in policies[name]["spec"]["ingress"]
            if rule["ports"] == [{"port": "grpc"}]
            for peer in rule["from"]
        }
        assert allowed == {caller for caller, entry in values.items() if name in entry["calls"]}, name


def test_one_replica_has_no_disruption_budget(chart: Chart) -> None:
    rendered = chart.documents({"services": {"feedback": {"replicas": 1}}})
    assert "feedback" not in of_kind(rendered, "PodDisruptionBudget")


def test_selectors_hold_nothing_that_a_release_changes(documents: list[Document]) -> None:
    for deployment in of_kind(documents, "Deployment").values():
        assert set(deployment["spec"]["selector"]["matchLabels"]) == {
            "app.kubernetes.io/name",
            "app.kubernetes.io/instance",
            "app.kubernetes.io/component",
        }


def test_images_can_be_named_by_digest_and_come_from_a_mirror(chart: Chart) -> None:
    deployments = of_kind(chart.documents(EVERYTHING), "Deployment")

    def image(name: str) -> str:
        return str(deployments[name]["spec"]["template"]["spec"]["containers"][0]["image"])

    assert image("gateway") == "registry.example.org/care/care-gateway@sha256:" + "a" * 64
    assert image("patients") == "registry.example.org/care/care-patients:0.1.0"


def test_the_environment_is_what_the_settings_read(chart: Chart, monkeypatch: pytest.MonkeyPatch) -> None:
    deployments = of_kind(chart.documents(EVERYTHING), "Deployment")
    [container] = deployments["scheduling"]["spec"]["template"]["spec"]["containers"]
    known = {f"CARE_{name.upper()}" for name in Settings.model_fields}
    for variable in container["env"]:
        if variable["name"].startswith("CARE_"):
            assert variable["name"].split("__")[0] in known, variable["name"]
            monkeypatch.setenv(variable["name"], variable.get("value", "from-a-secret"))
    settings = Settings()
    assert settings.environment == "production"
    assert settings.host == "0.0.0.0"
    assert settings.peers == {"patients": "dns:///care-care-coordinator-patients.care.svc:50051"}
    assert settings.issuers[0].tenants == {"north": TENANT}
    assert settings.signing_secret == "from-a-secret"
    assert settings.kafka is not None
    assert settings.kafka.bootstrap == "kafka:9092"
    assert settings.kafka.options == {
        "security_protocol": "SASL_SSL",
        "ssl_cafile": "/etc/care/kafka/ca.crt",
        "ssl_certfile": "/etc/care/kafka/tls.crt",
        "ssl_keyfile": "/etc/care/kafka/tls.key",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "from-a-secret",
        "sasl_plain_password": "from-a-secret",
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"replcas": 3},
        {"services": {"patients": {"replica": 3}}},
        {"services": {"billing": {"kind": "grpc"}}},
        {"services": {"patients": {"database": {"password": "x"}}}},
        {"services": {"patients": {"replicas": "two"}}},
        {"kafka": {"sasl": {"mechanism": "GSSAPI"}}},
        {"image": {"pullPolicy": "Sometimes"}},
    ],
    ids=str,
)
def test_an_unknown_or_wrong_value_is_refused(chart: Chart, wrong: Document) -> None:
    with pytest.raises(Refused, match="schema"):
        chart.text(wrong)


@pytest.mark.parametrize("missing", ["kafka", "issuers", "publicUrl"])
def test_what_must_be_given_is_asked_for_by_name(chart: Chart, missing: str) -> None:
    with pytest.raises(Refused, match=rf"{missing}(\.\w+)? is required"):
        chart.text(needed={key: value for key, value in NEEDED.items() if key != missing})


def test_the_chart_works_as_a_part_of_another(helm: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    (parent / "charts").mkdir(parents=True)
    shutil.copytree(CHART, parent / "charts/care-coordinator")
    dependency = {"name": "care-coordinator", "version": "0.1.0", "condition": "care-coordinator.enabled"}
    (parent / "Chart.yaml").write_text(
        yaml.safe_dump({"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]})
    )
    values = {"care-coordinator": NEEDED | {"enabled": True}, "global": {"ours": {"a": 1}}}
    rendered = Chart(helm, tmp_path, parent).text(needed=values)
    assert "kind: Deployment" in rendered
    assert "kind:" not in Chart(helm, tmp_path, parent).text(
        needed=merged(values, {"care-coordinator": {"enabled": False}})
    )


def test_no_secret_value_is_in_the_rendered_text(chart: Chart) -> None:
    for document in chart.documents(EVERYTHING):
        if document["kind"] not in ("Deployment", "Job"):
            continue
        for variable in document["spec"]["template"]["spec"]["containers"][0]["env"]:
            if re.search(r"PASSWORD|SECRET|DATABASE_URL|USERNAME", variable["name"]):
                assert set(variable) == {"name", "valueFrom"}, variable["name"]
