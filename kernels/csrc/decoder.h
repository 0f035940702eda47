/* A decoder layer for one new token of each sequence: the products of vlmq_linear and vlmq_attend, and what lies
 * between them, in one call. vlmq_cpu.h says what is computed.
 */
#ifndef VLMQ_DECODER_H
#define VLMQ_DECODER_H

static int64_t size_of(const vlmq_decoder *d) { return d->dtype == VLMQ_FLOAT32 ? 4 : 2; }

/* Layers of one x; those that follow each other with one plan are multiplied together. */
static int multiply(const vlmq_decoder *d, int first, int n, void *const *ys, const void *x, int64_t n_tokens,
                    int n_threads) {
    const vlmq_layer *const *layers = d->layers + first;
    int failed = 0;
    for (int i = 0, end; i < n && !failed; i = end) {
        for (end = i + 1; end < n && layers[end]->plan == layers[i]->plan;) end++;
        failed = vlmq_linear(layers + i, ys + i, end - i, x, n_tokens, d->dtype, n_threads);
    }
    return failed;
}

/* Norm and turn the heads of one token, with a norm and a turn or without: `heads` into `out`, one `step` elements
 * after the other, by way of `spare`, a head. No kernel writes where it reads. */
static void place_heads(const vlmq_decoder *d, int norm, const uint8_t *cos, const uint8_t *sin, const uint8_t *heads,
                        int64_t n_heads, uint8_t *spare, uint8_t *out, int64_t step) {
    const vlmq_kernels *kernels = isas[d->isa].kernels;
    const int64_t bytes = size_of(d) * d->head_dim;
    const int has_norm = norm >= 0 && d->norms[norm];
    for (int64_t h = 0; h < n_heads; h++) {
        const uint8_t *head = heads + h * bytes;
        uint8_t *to = out + h * step * size_of(d), *normed = cos ? spare : to;
        if (has_norm) kernels->norm(head, d->norms[norm], d->eps[norm], d->head_dim, normed, d->dtype);
        if (cos) kernels->rotate(has_norm ? normed : head, cos, sin, d->head_dim, to, d->dtype);
        if (!has_norm && !cos) memcpy(to, head, (size_t)bytes);
    }
}

/* q, k and v are those of the new tokens; turned (n_batch, n_heads, head_dim) and spare (head_dim) are overwritten. */
static int attend_new(const vlmq_decoder *d, const vlmq_past *p, const vlmq_token *t, const uint8_t *q,
                      const uint8_t *k, const uint8_t *v, uint8_t *turned, uint8_t *spare, void *out, int n_threads) {
    const int64_t size = size_of(d), n = d->head_dim, row = d->n_heads * n, kv_row = d->n_kv_heads * n;
    for (int64_t b = 0; b < t->n_batch; b++) {
        const uint8_t *cos = d->turns ? (const uint8_t *)t->cos + b * t->turn_batch * size : NULL;
        const uint8_t *sin = d->turns ? (const uint8_t *)t->sin + b * t->turn_batch * size : NULL;
        uint8_t *key = (uint8_t *)p->keys + (b * p->key_batch + t->n_past * p->key_token) * size;
        uint8_t *value = (uint8_t *)p->values + (b * p->value_batch + t->n_past * p->value_token) * size;
        place_heads(d, VLMQ_NORM_Q, cos, sin, q + b * row * size, d->n_heads, spare, turned + b * row * size, n);
        place_heads(d, VLMQ_NORM_K, cos, sin, k + b * kv_row * size, d->n_kv_heads, spare, key, p->key_head);
        place_heads(d, -1, NULL, NULL, v + b * kv_row * size, d->n_kv_heads, spare, value, p->value_head);
    }
    const int64_t sizes[16] = {t->n_batch,   d->n_heads,     d->n_kv_heads, t->n_past + 1,
                               n,            n,              row,           n,
                               p->key_batch, p->key_head,    p->key_token,  p->value_batch,
                               p->value_head, p->value_token, t->mask_batch, t->mask_head};
    return vlmq_attend(turned, p->keys, p->values, t->mask, out, sizes, d->scale, d->dtype, d->isa, n_threads);
}

static void norm_tokens(const vlmq_decoder *d, int norm, const uint8_t *x, int64_t n_tokens, uint8_t *out) {
    const int64_t bytes = d->hidden * size_of(d);
    for (int64_t i = 0; i < n_tokens; i++)
        isas[d->isa].kernels->norm(x + i * bytes, d->norms[norm], d->eps[norm], d->hidden, out + i * bytes, d->dtype);
}

/* One layer, x (n_batch, hidden) into out. */
static int decode_layer(const vlmq_decoder *d, const vlmq_past *past, const vlmq_token *token, const void *x, void *out,
                        int n_threads) {
    const vlmq_kernels *kernels = isas[d->isa].kernels;
    const int64_t size = size_of(d), n = token->n_batch;
    const int64_t hidden = round_up(n * d->hidden * size, 64), inner = round_up(n * d->intermediate * size, 64);
    const int64_t queries = round_up(n * d->n_heads * d->head_dim * size, 64);
    const int64_t keys = round_up(n * d->n_kv_heads * d->head_dim * size, 64), head = round_up(d->head_dim * size, 64);
    const int64_t bytes = 3 * hidden + 3 * queries + 2 * keys + 3 * inner + head;
    uint8_t *memory = NULL;
    if (posix_memalign((void **)&memory, 64, (size_t)bytes)) return -1;
    uint8_t *normed = memory, *added = normed + hidden, *sum = added + hidden, *q = sum + hidden, *turned = q + queries;
    uint8_t *mixed = turned + queries, *k = mixed + queries, *v = k + keys, *gate = v + keys, *up = gate + inner;
    uint8_t *gated = up + inner, *spare = gated + inner;
    void *const heads[] = {q, k, v}, *const one[] = {added}, *const both[] = {gate, up};

    norm_tokens(d, VLMQ_NORM_X, x, n, normed);
    int failed = multiply(d, VLMQ_Q, 3, heads, normed, n, n_threads);
    failed = failed || attend_new(d, past, token, q, k, v, turned, spare, mixed, n_threads);
    failed = failed || multiply(d, VLMQ_O, 1, one, mixed, n, n_threads);
    if (!failed) {
        kernels->add(x, added, n * d->hidden, sum, d->dtype);
        norm_tokens(d, VLMQ_NORM_MLP, sum, n, normed);
    }
    failed = failed || multiply(d, VLMQ_GATE, 2, both, normed, n, n_threads);
    if (!failed) kernels->gate(gate, up, n * d->intermediate, gated, d->dtype);
    failed = failed || multiply(d, VLMQ_DOWN, 1, one, gated, n, n_threads);
    if (!failed) kernels->add(sum, added, n * d->hidden, out, d->dtype);
    free(memory);
    return failed ? -1 : 0;
}

int vlmq_decode(const vlmq_decoder *const *decoders, const vlmq_past *const *pasts, int n_layers,
                const vlmq_token *token, void *outs, int n_threads) {
    const void *x = token->x;
    uint8_t *out = outs;
    for (int i = 0; i < n_layers; i++) {
        if (decode_layer(decoders[i], pasts[i], token, x, out, n_threads)) return -1;
        x = out;
        out += token->n_batch * decoders[i]->hidden * size_of(decoders[i]);
    }
    return 0;
}

#endif
