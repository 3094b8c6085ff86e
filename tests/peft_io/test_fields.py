"""Fields of ``peft.LoraConfig`` that choose: the same names, counts, outputs and first step as in PEFT, or a refusal."""

import pytest
import torch
from support.peft_fields import 
from support.peft_help import 

import fastlora

