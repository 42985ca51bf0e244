"""Reward functions of a user, good and bad."""

import math
import os
import time

import numpy as np


def length(text, answer, messages):
    print("a reward function may print")
    return len(text) / 10


def equal(text, answer, messages):
    return text == answer and messages[0]["role"] == "user"


def moody(text, answer, messages):
    """What it does stands in the text."""
    if text == "crash":
        os._exit(3)
    if text == "abort":
        os.abort()
    if text == "hang":
        time.sleep(600)
    if text == "raise":
        raise KeyError("no such key\nand a second line")
    return {
        "nan": math.nan,
        "inf": math.inf,
        "none": None,
        "text": "1",
        "numpy": np.float32(0.5),
    }.get(text, True)
