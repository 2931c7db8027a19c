/* deinfer/deinfer.h: the engine for hosts in C, and in every language that can call C.

   Functions that can fail return a deinfer_status; deinfer_last_error() then says why. No C++
   exception leaves them. Handles are opaque; whoever creates one destroys it, and destroying NULL
   does nothing. Strings are UTF-8 and end in a zero byte; what a caller passes in is copied.

   Threads: submit, abort, stats and has_unfinished of one engine may be called from any thread at
   any time, also during a step; one thread at a time calls step. Other handles belong to one thread
   at a time. */
#ifndef DEINFER_DEINFER_H_
#define DEINFER_DEINFER_H_

#include <stddef.h>
#include <stdint.h>

#include "deinfer/export.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum deinfer_status {
  DEINFER_OK = 0,
  DEINFER_INVALID_ARGUMENT = 1, /* the message names the operand and its value */
  DEINFER_UNSUPPORTED = 2,      /* valid, but this build or version cannot do it */
  DEINFER_OUT_OF_MEMORY = 3,    /* memory or KV blocks do not suffice */
  DEINFER_INTERNAL = 4          /* a bug or a failed worker */
} deinfer_status;

/* Why a sample ended. */
typedef enum deinfer_finish {
  DEINFER_RUNNING = 0,
  DEINFER_STOP = 1,   /* an end-of-sequence or stop token, which is the last of its tokens */
  DEINFER_LENGTH = 2, /* max_tokens, or the context is full */
  DEINFER_ABORT = 3
} deinfer_finish;

typedef struct deinfer_config deinfer_config;   /* EngineConfig of deinfer/engine.h */
typedef struct deinfer_params deinfer_params;   /* SamplingParams of deinfer/sampling_params.h */
typedef struct deinfer_engine deinfer_engine;   /* a loaded model */
typedef struct deinfer_outputs deinfer_outputs; /* what a step has brought */

/* "major.minor.patch" of the library that is loaded; DEINFER_VERSION is that of this header. */
DEINFER_API const char* deinfer_version(void);

/* What went wrong in the calling thread's last call that did not return DEINFER_OK; "" before any.
   Valid until that thread's next call that fails. */
DEINFER_API const char* deinfer_last_error(void);

/* Configurations start with the defaults of the C++ struct. Fields are set by the names that they
   have there, and values are text: "true" or "false", numbers, "none" for an optional field that is
   to be empty, lists with commas ("2,7"). DEINFER_INVALID_ARGUMENT for an unknown name or a value
   that is not of the field's type; ranges are checked where the configuration is used. */
DEINFER_API deinfer_status deinfer_config_create(deinfer_config** config);
DEINFER_API deinfer_status deinfer_config_set(deinfer_config* config, const char* name,
                                              const char* value);
DEINFER_API void deinfer_config_destroy(deinfer_config* config);

DEINFER_API deinfer_status deinfer_params_create(deinfer_params** params);
DEINFER_API deinfer_status deinfer_params_set(deinfer_params* params, const char* name,
                                              const char* value);
DEINFER_API void deinfer_params_destroy(deinfer_params* params);

/* Loads the model; the configuration may be destroyed afterwards. */
DEINFER_API deinfer_status deinfer_engine_create(const deinfer_config* config,
                                                 deinfer_engine** engine);
/* Not while another thread is in a call with this engine. */
DEINFER_API void deinfer_engine_destroy(deinfer_engine* engine);

typedef struct deinfer_model_info {
  int32_t num_layers;
  int32_t hidden_size;
  int32_t vocab_size;    /* token ids are in [0, vocab_size) */
  int32_t max_model_len; /* tokens per sequence, prompt included */
  uint64_t parameters;
  uint64_t weight_bytes;   /* resident on all ranks */
  uint64_t kv_cache_bytes; /* of the KV pool */
} deinfer_model_info;
DEINFER_API deinfer_status deinfer_engine_model_info(const deinfer_engine* engine,
                                                     deinfer_model_info* info);

typedef struct deinfer_engine_stats {
  int32_t num_waiting; /* samples */
  int32_t num_running;
  int64_t free_kv_blocks;
  int64_t num_steps;
  int64_t num_preemptions;
  int64_t prompt_tokens; /* computed */
  int64_t generated_tokens;
} deinfer_engine_stats;
DEINFER_API deinfer_status deinfer_engine_get_stats(const deinfer_engine* engine,
                                                    deinfer_engine_stats* stats);

/* Copies prompt[length], token ids, and the parameters (NULL: the defaults); *request names it. */
DEINFER_API deinfer_status deinfer_engine_submit(deinfer_engine* engine, const int32_t* prompt,
                                                 size_t length, const deinfer_params* params,
                                                 uint64_t* request);
/* Ends one sample, or all (-1). *ended (may be NULL) is 1, or 0 if there was nothing to end. Their
   last outputs come with the next step. */
DEINFER_API deinfer_status deinfer_engine_abort(deinfer_engine* engine, uint64_t request,
                                                int32_t sample, int32_t* ended);
/* 1 while a request has not brought its last output, else 0. */
DEINFER_API int32_t deinfer_engine_has_unfinished(const deinfer_engine* engine);

/* Runs one batch. *outputs, to be destroyed by the caller, has an entry for every sample that
   progressed. After a worker has failed, every later call returns that failure. */
DEINFER_API deinfer_status deinfer_engine_step(deinfer_engine* engine, deinfer_outputs** outputs);

typedef struct deinfer_output {
  uint64_t request;
  int32_t sample;        /* [0, n) */
  const int32_t* tokens; /* [num_tokens], new since the last step; owned by the deinfer_outputs */
  size_t num_tokens;
  const float* logprobs;    /* [num_tokens], natural logarithms, if `logprobs` was set; else NULL */
  deinfer_finish finish;    /* DEINFER_RUNNING: more will come */
  int32_t request_finished; /* 1 if all samples of the request have ended */
} deinfer_output;
DEINFER_API size_t deinfer_outputs_count(const deinfer_outputs* outputs);
/* DEINFER_INVALID_ARGUMENT unless index < deinfer_outputs_count(outputs). */
DEINFER_API deinfer_status deinfer_outputs_get(const deinfer_outputs* outputs, size_t index,
                                               deinfer_output* output);
DEINFER_API void deinfer_outputs_destroy(deinfer_outputs* outputs);

#ifdef __cplusplus
}
#endif

#endif /* DEINFER_DEINFER_H_ */
