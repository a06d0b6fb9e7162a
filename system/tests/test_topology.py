"""The topology says what the chart and the compose file say."""

from pathlib import Path

import yaml

from system.topology import GATEWAY, NODES, SERVICES, peers

ROOT = Path(__file__).resolve().parents[2]


def test_the_chart_has_the_same_workloads_that_call_the_same_services():
    values = yaml.safe_load((ROOT / "deploy/helm/care-coordinator/values.yaml").read_text())["services"]
    assert {name: tuple(each["calls"]) for name, each in values.items()} == {n: node.calls for n, node in NODES.items()}
    assert {name for name, each in values.items() if "database" in each} == {
        n for n, node in NODES.items() if node.database
    }
    assert {name for name, each in values.items() if each["kafka"]} == set(SERVICES)


def test_the_compose_file_runs_the_same_workloads():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert set(NODES) <= set(services)
    for node in SERVICES.values():
        assert services[node.name]["environment"]["CARE_DATABASE_URL"].endswith(f"/{node.database}")


def test_no_two_services_share_a_port():
    ports = [port for node in SERVICES.values() for port in (node.port, node.health_port, node.metrics_port)]
    assert len({*ports, GATEWAY.port}) == len(ports) + 1


def test_no_service_calls_itself_over_others():
    """A circle would be a deadlock of read-throughs waiting to happen."""

    def reached(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " calls ".join((*path, name))
        for called in NODES[name].calls:
            reached(called, (*path, name))

    reached(GATEWAY.name, ())


def test_two_replicas_of_a_service_are_one_target():
    addresses = {"patients": ["127.0.0.1:1", "127.0.0.1:2"], "scheduling": ["127.0.0.1:3"]}
    assert peers("feedback", addresses) == {
        "patients": "ipv4:127.0.0.1:1,127.0.0.1:2",
        "scheduling": "ipv4:127.0.0.1:3",
    }
