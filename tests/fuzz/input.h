/* input.h - a fuzzer's bytes, taken from the front; zeroes behind their end. And the oracle's
 * check. Must not know what is fuzzed. */
#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* Not assert(): an oracle must speak whatever NDEBUG says. */
#define REQUIRE(claim)                                                                             \
    do {                                                                                           \
        if (!(claim)) {                                                                            \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #claim);                  \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

struct input {
    const uint8_t *at;
    size_t left;
};

static inline uint8_t take8(struct input *input)
{
    if (input->left == 0)
        return 0;
    input->left--;
    return *input->at++;
}

static inline uint16_t take16(struct input *input)
{
    uint16_t low = take8(input);

    return (uint16_t)(low | take8(input) << 8);
}

#endif
