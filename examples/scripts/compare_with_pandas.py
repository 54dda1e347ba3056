"""Compare plans, and work with the numbers in pandas: which plan loses least for its size?"""

import sys

import pandas

import fewbit

model, *plans = sys.argv[1:]
compared = fewbit.compare(model, plans=["bf16", *plans], samples=1)
table = pandas.DataFrame(
    {
        "plan": row.plan,
        "MB": row.disk_bytes / 1e6,
        "KL": row.loss.kl.value,
        "same top": row.loss.same_top.value,
        "tokens/s": row.speed.decode.median,
    }
    for row in compared.rows
    if row.status == "done"
).set_index("plan")
print(table.sort_values("KL").round(4).to_string())
