// The record of this build, a JSON object that megatron_samoe/ops/extension.py finds in the library's bytes without
// loading it: a library of another torch must be recognised before the loader meets its symbols.
extern "C" __attribute__((visibility("default"), used)) const char megatron_samoe_build_record[] =
    "MEGATRON_SAMOE_BUILD_INFO=" SAMOE_BUILD_RECORD;
