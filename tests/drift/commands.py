"""Call a command module as the command line does."""

import argparse

import pytest


def run(module, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.run(parser.parse_args([str(w) for w in words])) == 0


def fails(module, text, *words):
    """The command raises one line of ValueError that holds `text`."""
    with pytest.raises(ValueError) as caught:
        run(module, *words)
    assert text in str(caught.value) and "\n" not in str(caught.value), caught.value
