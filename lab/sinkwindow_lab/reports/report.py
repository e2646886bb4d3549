"""Everything that one run of `sinkwindow tables` measured, as one JSON file."""

from __future__ import annotations

from sinkwindow_lab.records import BosPolicy, CorpusRecord, ExperimentRecord, MachineRecord, ModelRecord, Record
from sinkwindow_lab.reports.study_records import Studies

SCHEMA = 3


class Report(Record):
    """The machine, the inputs and the results of a run; parts that were not requested are empty or None."""

    schema_version: int = SCHEMA
    quick: bool
    bos: BosPolicy
    machine: MachineRecord
    model: ModelRecord
    corpora: list[CorpusRecord]
    experiments: list[ExperimentRecord]
    studies: Studies = Studies()
