"""The plan: what a config needs on a machine that is not here, by that machine's own compiler.

    mmjax plan --config=CONFIG --topology=v5e:16x16 [--slices=N] [--task=NAME]
        [--json=FILE] [--fast] [--advise] [--config.KEY=VALUE ...]

Every program of the config (training and evaluation of each task) is compiled for the described chips, with
no such chip here: `pip install 'mmjax[tpu]'` brings the compiler for TPUs, `'mmjax[gpu-plan]'` that for GPUs.
Nothing is run. Exit status: 0 everything fits, 1 something does not (or did not compile), 2 an error.
With `--advise`, micro-batches and rematerialisation are tried for each task, and the fastest choice that
fits is printed as overrides. Reports are cached by content in `~/.cache/mmjax/plan`.

`--json` writes what `mmjax.plan.report` makes:

    version         1; raised when a key changes its meaning or goes
    config, overrides   as given
    topology        {name, slices, devices, device: JAX's name of the kind}
    mesh            size by axis
    compiler        {jax, jaxlib, libtpu or jax-cuda12-pjrt: versions, effort: "default" or "fast"}
    assumed         of a device: {flops: FLOP/s, memory: bytes, bandwidth, ici, dcn: bytes a second}
    steps, hours    of the run; hours are the estimates of all training steps (null if one has none)
    state_bytes     of a device: parameters, optimizer state, buffers
    code_bytes      generated code of all programs
    fits            whether every program compiled and fits
    programs        a list of
      name, task, kind    as the run names them; kind is "train" or what evaluation computes
      shape, tokens, visits   of a batch, in words; tokens of a batch; steps of the run (train only)
      status          "compiled", "out_of_memory", "failed", "crashed" or "time_limit"
      message         the message, if it is none of the first two
      compile_seconds, cached
      fits
      bytes           of a device: {arguments, temporaries, beside (the next batch; in evaluation the rest of the
                      state), code (of all programs), needed: their sum, limit, over}; of "out_of_memory",
                      {required: as the compiler reported} instead of the first two
      help            what would help, if it does not fit
      flops           of a call on all devices: {model, compiled, ratio}; above a ratio of 1.10, or without model
                      FLOPs, also rest: [{part, flops, largest: names of JAX operations}]
      memory_traffic  bytes that a device moves to and from its memory
      collectives     [{wire: "ici" or "dcn", kind, axes: mesh axes joined by +, bytes: that a device sends}]
      unknown         loops whose turns could not be counted, kernels whose FLOPs are not in the text
      estimate        seconds by roofline at `assumed`, NOT measured: {compute, memory, busy: sum over instructions
                      of the longer of both, ici, dcn, seconds: the longest of busy, ici and dcn, mfu}
      hours           visits x seconds (train only)
"""
