"""A simulated CANN: the real torch-npu runs on a CPU.

torch-npu talks to an NPU through CANN's C libraries. `build` makes stand-ins for them, from the symbols that
the installed wheel asks for: memory, streams, events, virtual memory and HCCL are real, over the host's
memory and between real processes. `numeric` gives torch_npu's operations their numbers.
`python -m grpo_conformance.cann -- COMMAND` runs a command with both.
"""
