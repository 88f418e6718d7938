"""A file of hardware: read as it is, or refused with the key that is wrong."""

import copy
import json

import pytest

from workbench.errors import InputError
from workbench.lib.core.simulation.hardware import PARTS, Hardware, names

MINE = {
    "name": "mine",
    "basis": "measured",
    "source": "a bench",
    "device": {"flops": 1e12, "memory_bytes": 16e9, "memory_bandwidth": 3e11},
    "link": {"bandwidth": 1e10, "latency_seconds": 0},
    "devices_per_node": 4,
}


def read(tmp_path, found) -> Hardware:
    file = tmp_path / "mine.json"
    file.write_text(found if isinstance(found, str) else json.dumps(found))
    return Hardware.read(file)


def test_a_file_is_read_as_it_is(tmp_path):
    found = read(tmp_path, MINE)
    assert found.to_dict() == MINE and found.need("device", "link") is found
    assert (found.link.bandwidth, found.devices_per_node, found.host) == (1e10, 4, None)
    assert found.label == "simulated, calibrated by mine (measured)"
    with pytest.raises(InputError, match=r"'mine' must have host, disk but says nothing"):
        found.need("device", "host", "disk")


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("device", "flops"), -1, r"device: flops is -1 but must be from 1 to 1e\+24"),
        (("device", "flops"), 0, "flops is 0"),
        (("device", "flops"), 10**400, "flops is 1000"),
        (("device", "flops"), float("nan"), "flops is nan"),
        (("device", "memory_bytes"), float("inf"), "memory_bytes is inf"),
        (("device", "memory_bandwidth"), "fast", "memory_bandwidth is 'fast' but must be a number"),
        (("device", "memory_bandwidth"), True, "memory_bandwidth is True but must be a number"),
        (("device", "memory_bandwidth"), None, "memory_bandwidth is None but must be a number"),
        (("device", "memory_bytes"), 1e25, r"memory_bytes is 1e\+25 but must be from 1 to 1e\+24"),
        (("link", "bandwidth"), 1e-9, "bandwidth is 1e-09"),
        (("link", "latency_seconds"), 4000, "latency_seconds is 4000"),
        (("link", "latency_seconds"), -1e-6, "latency_seconds is -1e-06 but must be from 0 to 3600"),
        (("device", "cores"), 4, "device: key 'cores' is unknown"),
        (("lnk",), {}, r"key 'lnk' is unknown; did you mean 'link'"),
        (("link",), [1], r"link is \[1\] but must be an object"),
        (("devices_per_node",), 2.5, "devices_per_node is 2.5"),
        (("devices_per_node",), 0, "devices_per_node is 0"),
        (("basis",), "guessed", "basis is 'guessed' but must be one of specified, measured"),
        (("name",), "", "name is ''"),
        (("name",), "two\nlines", r"name is 'two\\nlines' but must be a line of text"),
        (("source",), 3, "source is 3"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(tmp_path, path, value, said):
    found = copy.deepcopy(MINE)
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=said) as refusal:
        read(tmp_path, found)
    assert "mine.json" in str(refusal.value)


@pytest.mark.parametrize("path", [("name",), ("basis",), ("source",), ("device", "flops"), ("link", "bandwidth")])
def test_a_missing_key_is_named(tmp_path, path):
    found = copy.deepcopy(MINE)
    place = found
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    with pytest.raises(InputError, match=f"key '{path[-1]}' is missing"):
        read(tmp_path, found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be an object"),
        ('{"name":"a","basis":"measured","source":"b"}', "nothing"),
        ('{"link":{"bandwidth":1,"latency_seconds":0,"bandwidth":2}}', "key 'bandwidth' is there twice"),
    ],
)
def test_a_file_that_describes_no_machine_is_refused(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        read(tmp_path, text)


def test_a_file_that_is_not_there_and_a_machine_nobody_knows_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Hardware.read(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"hardware 'a40' is unknown; did you mean 'a40-pcie4'"):
        Hardware.named("a40")


@pytest.mark.parametrize("name", names())
def test_the_public_machines_are_specified_with_a_source_and_serve_experts(name):
    found = Hardware.named(name).need("device", "host", "link")
    assert found.basis == "specified" and len(found.source) > 100
    assert found.label == f"simulated, calibrated by {name} (specified)"
    assert {part for part in PARTS if getattr(found, part)} >= {"device", "host", "link"}
    assert found.link.bandwidth < found.host.memory_bandwidth < found.device.memory_bandwidth
