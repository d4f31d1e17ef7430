# fuzz-run      coverage-guided, FUZZ_SECONDS for each target (needs clang); inputs that reach new
#               code are kept in build/fuzz/corpus
# fuzz-merge    tests/fuzz/corpus and these, reduced to what their coverage needs (clang 14 or newer)
# fuzz-replay   the corpus once, under gcc's sanitizers
#
# Run from the root: make -f tests/fuzz/fuzz.mk fuzz-run

FUZZ_SECONDS ?= 60
FUZZ_CLANG ?= $(firstword $(foreach name,clang clang-19 clang-18 clang-17 clang-16 clang-15 clang-14,$(shell command -v $(name) 2>/dev/null)))
FUZZ_BUILD ?= build/fuzz
TARGETS := ring balloon
CORE := $(addprefix c_src/,guest_mem.c chain.c ring.c ring_split.c ring_packed.c dirty_log.c sigbus.c balloon.c mapping.c given_up.c shared_before.c backing.c memfd.c discard.c)
INPUTS := $(CORE) $(wildcard c_src/*.h tests/fuzz/*.h) tests/fuzz/fuzz.mk
FLAGS := -std=gnu11 -D_GNU_SOURCE -O1 -g -Wall -Wextra -Werror -UNDEBUG -pthread -Ic_src
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all

.PHONY: fuzz-run fuzz-merge fuzz-replay fuzz-clang $(TARGETS:%=fuzz-run-%) $(TARGETS:%=fuzz-merge-%) $(TARGETS:%=fuzz-replay-%)

fuzz-run: $(TARGETS:%=fuzz-run-%)
fuzz-merge: $(TARGETS:%=fuzz-merge-%)
fuzz-replay: $(TARGETS:%=fuzz-replay-%)

fuzz-clang:
	@test -n "$(FUZZ_CLANG)" || { echo "make: fuzzing needs clang: install it, or set FUZZ_CLANG=" >&2; exit 1; }

$(FUZZ_BUILD)/fuzz_%: tests/fuzz/fuzz_%.c $(INPUTS) | fuzz-clang
	@mkdir -p $(@D)
	$(FUZZ_CLANG) $(FLAGS) -fsanitize=fuzzer $(SANITIZE) -o $@ $< $(CORE)

$(FUZZ_BUILD)/replay_%: tests/fuzz/fuzz_%.c tests/fuzz/replay.c $(INPUTS)
	@mkdir -p $(@D)
	gcc $(FLAGS) $(SANITIZE) -o $@ $< tests/fuzz/replay.c $(CORE)

$(TARGETS:%=fuzz-run-%): fuzz-run-%: $(FUZZ_BUILD)/fuzz_%
	@mkdir -p $(FUZZ_BUILD)/found-$* $(FUZZ_BUILD)/corpus/$*
	$< -max_total_time=$(FUZZ_SECONDS) -max_len=2048 -print_final_stats=1 \
	    -artifact_prefix=$(FUZZ_BUILD)/found-$*/ $(FUZZ_BUILD)/corpus/$* tests/fuzz/corpus/$*

# Into a new folder that then takes the old one's place: merging never removes.
$(TARGETS:%=fuzz-merge-%): fuzz-merge-%: $(FUZZ_BUILD)/fuzz_%
	rm -rf $(FUZZ_BUILD)/merged-$*
	mkdir -p $(FUZZ_BUILD)/merged-$* $(FUZZ_BUILD)/corpus/$*
	$< -set_cover_merge=1 -max_len=2048 $(FUZZ_BUILD)/merged-$* tests/fuzz/corpus/$* $(FUZZ_BUILD)/corpus/$*
	rm -rf tests/fuzz/corpus/$*
	mv $(FUZZ_BUILD)/merged-$* tests/fuzz/corpus/$*

$(TARGETS:%=fuzz-replay-%): fuzz-replay-%: $(FUZZ_BUILD)/replay_%
	$< tests/fuzz/corpus/$*

.SECONDARY:
