"""Measures what there is to know about this code on an accelerator, within a few minutes.

    python -m benchmarks.record --minutes=9 --out=DIR --data=SHARDS [--stages=sanity,rates,quality]

Three stages, each a list of items: does it run there and compute what a CPU computes (sanity), how
fast (rates), how good do encoders get in how long (quality). Each item adds a line to
`DIR/records.jsonl` and a row to `DIR/records.md`. The same command continues where the last one
ended: finished items are skipped, an item that does not fit into the remaining time is not started,
and a training run is saved when the time is up and continued by the next call. An item that fails
does not stop the others.

    steps      every train step that is compiled here, as a config, and its sizes
    items      the list: name and time limit of each item; new ones are added here
    sanity, processes, rates, profile, quality    the work of the items
    setting    the inputs of an item, and how processes are started
    schedule   which item is next, and when it must end
    worker     a process that runs items one by one
    ledger     the records and the table
    plan       the same steps, compiled for a TPU that need not exist; not part of a call
"""
