"""Reads the description of a cluster: nodes, cards, racks, leaves and spines."""

import json
from pathlib import Path

from pydantic import ValidationError

from evermesh.launcher import job_yaml
from evermesh.launcher.errors import LayoutRequestInvalid
from evermesh.parallelism.topology import Topology


def read_topology(path: Path) -> Topology:
    """The topology in a JSON or YAML file.

    Raises:
        LayoutRequestInvalid: it cannot be read, or is none.
    """
    if not path.is_file():
        raise LayoutRequestInvalid(f"{path} is no file (looked from {Path.cwd()}). Give the path of a topology.")
    try:
        values, lines = (json.loads(path.read_text()), {}) if path.suffix == ".json" else job_yaml.read(path)
        return Topology.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"]
        line = next((lines[key[:end]] for end in range(len(key), 0, -1) if key[:end] in lines), None)
        raise LayoutRequestInvalid(
            f"{path}{f':{line}' if line else ''}: {job_yaml.dotted(key) or 'the file'}: {first['msg']}. A topology has "
            "nodes, each with a name, devices and nics, and for paths leaves, each with a name, spines and bytes_per_s."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LayoutRequestInvalid(
            f"{path} cannot be read as a topology: {error}. Give a .json or .yaml file."
        ) from error
