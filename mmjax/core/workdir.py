"""Names of the files of a run in its workdir."""

from __future__ import annotations

METRICS = "metrics.jsonl"
GOODPUT = "goodput.jsonl"
SUMMARY = "summary.json"
SEGMENTS = "segments.jsonl"
RESULTS = "results.json"  # of the run's own end
EVALUATIONS = "evaluations.jsonl"  # of each `mmjax evaluate`
REPORT = "report.html"
LEASE = "lease.json"
PINNED = "init_from.json"  # the step of another run that this one began from
