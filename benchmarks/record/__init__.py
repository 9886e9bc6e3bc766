"""All that is to be known of this code on an accelerator, in the minutes that there are for it.

    python -m benchmarks.record --minutes=9 --out=DIR --data=SHARDS [--stages=sanity,rates,quality]

Three stages, each a list of items: does it run there, and compute what a CPU computes (sanity); how
fast (rates); how good do encoders get in how long (quality). After each item there is a line more
in `DIR/records.jsonl` and a row more in `DIR/records.md`. The same command goes on where the last
one ended: what is done is skipped, what does not fit into the time left is not begun, and a
training run is saved when the time is up and carries on. An item that fails stops no other.

    steps      every train step that is compiled here, as a config
    sanity, rates, quality    the items' work
    items      their list: what each is called, how long it may take
    ledger     records, and the table
    worker     a process that does items one by one
    schedule   which item is next, and when it has to end
"""
