"""scontrol requeue JOB"""

from recording import STATE, record

verb, job = record("scontrol")
assert verb == "requeue"
(STATE / f"requeued-{job}").touch()
