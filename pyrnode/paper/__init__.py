"""The paper's figures, table and claims, each with one command: `reproduce`.

An experiment is one file: what it trains (`Experiment.needs`) and what it makes of it (`Experiment.measure`). How large
its networks are and how long they train is the scale's (scales.py); training, resuming and scoring are the study's
(study.py); pictures, numbers and reports are written in report.py. catalogue.py lists the experiments and runs them.
"""

from pyrnode.paper.catalogue import EXPERIMENTS, reproduce
from pyrnode.paper.report import Claim, Finding
from pyrnode.paper.scales import SCALES, Scale

__all__ = ["EXPERIMENTS", "SCALES", "Claim", "Finding", "Scale", "reproduce"]
