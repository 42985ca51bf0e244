"""Fixtures of the training tests serve here too."""

from tests.train.conftest import chats, data_cache, tiny_model  # noqa: F401
