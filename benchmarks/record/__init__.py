"""All that is to be known of this code on an accelerator, in the minutes that there are for it.

    python -m benchmarks.record --minutes=9 --out=DIR --data=SHARDS [--stages=sanity,rates,quality]

Three stages, each a list of items: does it run there, and compute what a CPU computes (sanity); how
fast (rates); how good do encoders get in how long (quality). After each item there is a line more
in `DIR/records.jsonl` and a row more in `DIR/records.md`. The same command goes on where the last
one ended: what is done is skipped, what does not fit into the time left is not begun, and a
training run is saved when the time is up and carries on. An item that fails stops no other.

    steps      every train step that is compiled here, as a config, and how large it is
    items      the list: what each item is called, how long it may take; a new one is added here
    sanity, processes, rates, profile, quality    the items' work
    setting    what an item is given, and what a process is started with
    schedule   which item is next, and when it has to end
    worker     a process that does items one by one
    ledger     records, and the table
    plan       the steps, compiled for a TPU that is not there; no part of a call
"""
