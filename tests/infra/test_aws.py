"""infra/aws: the cluster file as `ray up` reads it, and what the policies allow."""

import copy
import json
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.util import prepare_config, validate_config
from ruamel.yaml import YAML

FOLDER = Path(__file__).parents[2] / "infra/aws"
POLICIES = {file.name: json.loads(file.read_text()) for file in FOLDER.glob("*-policy.json")}
ANY_RESOURCE = {"ec2:DescribeInstances", "ecr:GetAuthorizationToken"}  # AWS knows no narrower one


@pytest.fixture
def cluster() -> dict[str, Any]:
    """The cluster file as PyYAML, with which Ray reads it, would have it."""
    content: dict[str, Any] = YAML(typ="safe").load((FOLDER / "cluster.yaml").read_text())
    return copy.deepcopy(json.loads(json.dumps(content)))


def test_ray_up_accepts_the_file(cluster):
    validate_config(prepare_config(cluster))


def test_ray_up_would_refuse_a_misspelt_key(cluster):
    cluster["idle_timeout"] = 5
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(cluster))


def test_workers_are_spot_instances_and_the_head_is_not(cluster):
    types = cluster["available_node_types"]
    assert types["worker"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types[cluster["head_node_type"]]["node_config"]


def test_the_token_reaches_every_node_and_the_dashboard_listens_to_the_head_alone(cluster):
    assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    (start,) = (line for line in cluster["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in start


def test_instances_hand_out_credentials_to_signed_requests_only(cluster):
    for node in cluster["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}


@pytest.mark.integration
def test_ray_up_creates_no_role_key_or_security_group_of_its_own(cluster, tmp_path, monkeypatch):
    """Ray's own would be a role with all rights on EC2 and S3, and SSH open to the world."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    key = tmp_path / "aegan.pem"
    key.touch(mode=0o600)
    cluster["auth"]["ssh_private_key"] = str(key)
    with mock_aws():
        region = cluster["provider"]["region"]
        ec2, iam = boto3.resource("ec2", region), boto3.resource("iam")
        network = ec2.create_vpc(CidrBlock="10.0.0.0/16")
        subnet = network.create_subnet(CidrBlock="10.0.0.0/24")
        subnet.meta.client.modify_subnet_attribute(
            SubnetId=subnet.id, MapPublicIpOnLaunch={"Value": True}
        )
        group = network.create_security_group(GroupName="aegan", Description="Ray")
        ec2.create_key_pair(KeyName="aegan")
        for node in cluster["available_node_types"].values():
            node["node_config"] |= {"SubnetIds": [subnet.id], "SecurityGroupIds": [group.id]}

        def everything() -> list[set[str]]:
            return [
                {item.id for item in ec2.security_groups.all()},
                {item.name for item in ec2.key_pairs.all()},
                {item.name for item in iam.roles.all()},
                {item.name for item in iam.instance_profiles.all()},
            ]

        before = everything()
        result = bootstrap_aws(prepare_config(cluster))
        assert everything() == before
    for name, node in result["available_node_types"].items():
        assert node["node_config"]["IamInstanceProfile"]["Arn"].endswith(f"/aegan-{name}")
        assert node["node_config"]["SecurityGroupIds"] == [group.id]


def statements(policy: dict[str, Any]) -> list[tuple[set[str], set[str], dict[str, Any]]]:
    """(actions, resources, conditions) of each statement."""
    return [
        (as_set(part["Action"]), as_set(part.get("Resource", [])), part.get("Condition", {}))
        for part in policy["Statement"]
    ]


def as_set(value: str | list[str]) -> set[str]:
    return {value} if isinstance(value, str) else set(value)


def too_broad(policy: dict[str, Any]) -> set[str]:
    """Actions by pattern, and actions on any resource that AWS could limit."""
    found = set()
    for actions, resources, _ in statements(policy):
        found |= {action for action in actions if "*" in action}
        if "*" in resources:
            found |= actions - ANY_RESOURCE
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_allows_named_actions_on_named_resources(name):
    assert too_broad(POLICIES[name]) == set()
    assert {part["Effect"] for part in POLICIES[name]["Statement"]} == {"Allow"}


@pytest.mark.parametrize(
    ("action", "resource"), [("s3:*", "arn:aws:s3:::b/p/*"), ("s3:GetObject", "*"), ("*", "*")]
)
def test_a_policy_that_is_too_broad_would_be_found(action, resource):
    policy = {"Statement": [{"Effect": "Allow", "Action": action, "Resource": resource}]}
    assert too_broad(policy) == {action}


def test_the_bucket_policy_ends_at_the_prefix():
    prefix = "arn:aws:s3:::my-bucket/aegan/*"
    for actions, resources, conditions in statements(POLICIES["bucket-policy.json"]):
        if "s3:ListBucket" in actions:
            assert resources == {"arn:aws:s3:::my-bucket"}
            assert conditions == {"StringLikeIfExists": {"s3:prefix": ["aegan", "aegan/*"]}}
        else:
            assert resources == {prefix}


def test_the_autoscaler_changes_no_instance_of_others():
    for actions, resources, conditions in statements(POLICIES["autoscaler-policy.json"]):
        changes = actions & {"ec2:RunInstances", "ec2:TerminateInstances", "ec2:CreateTags"}
        if changes and any(resource.endswith(":instance/*") for resource in resources):
            assert conditions.keys() == {"StringEquals"}


def test_only_the_named_services_take_a_role():
    (ec2,) = POLICIES["ec2-trust-policy.json"]["Statement"]
    assert ec2["Principal"] == {"Service": "ec2.amazonaws.com"}
    (irsa,) = POLICIES["irsa-trust-policy.json"]["Statement"]
    accounts = [value for key, value in irsa["Condition"]["StringEquals"].items() if "sub" in key]
    assert accounts == ["system:serviceaccount:aegan:aegan"]


def test_roles_and_ids_are_the_same_in_policies_and_cluster(cluster):
    (passed,) = (
        resources
        for actions, resources, _ in statements(POLICIES["autoscaler-policy.json"])
        if "iam:PassRole" in actions
    )
    worker = cluster["available_node_types"]["worker"]["node_config"]
    (role,) = passed
    assert worker["IamInstanceProfile"]["Arn"].split("/")[1] == role.split("/")[1]
    started_with = statements(POLICIES["autoscaler-policy.json"])[2][1]
    for identifier in (*worker["SubnetIds"], *worker["SecurityGroupIds"]):
        assert any(resource.endswith(f"/{identifier}") for resource in started_with)
