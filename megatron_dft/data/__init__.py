"""Rows to messages to token ids with an assistant mask to packs; no torch.distributed here.

In the order of the data:

    sources, readers, json_array   what --train-data names, and its rows in bounded memory
    schema                         any layout of rows to one `Conversation`, or the reason why not
    template, chat_mask            the chat template, and the characters of a text that train
    encode, tokenizer              ids with the supervised ones flagged
    prepare, workers, cache, store tokenised once, in parallel, kept by content, memory-mapped
    overlong, order, packing,
    row_plan, rows, dataset        sample number to the arrays of a row, the same on every rank
    fingerprint                    what a resume compares
    inspect, statistics, show      `megatron-dft inspect-data`
"""
