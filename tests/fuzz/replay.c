/* replay.c - runs a fuzz target over the files and folders given, without a fuzzer. Must not know
 * which target it is linked with. */
#include <dirent.h>
#include <sys/stat.h>

#include "input.h"

static unsigned replayed;

static void replay_file(const char *path)
{
    static uint8_t bytes[1 << 20];
    FILE *file = fopen(path, "rb");

    REQUIRE(file != NULL);
    size_t size = fread(bytes, 1, sizeof bytes, file);
    REQUIRE(ferror(file) == 0);
    fclose(file);
    /* A copy of the exact size, so that the sanitizer sees a read behind its end. */
    uint8_t *exact = malloc(size + (size == 0));
    REQUIRE(exact != NULL);
    for (size_t i = 0; i < size; i++)
        exact[i] = bytes[i];
    LLVMFuzzerTestOneInput(exact, size);
    free(exact);
    replayed++;
}

static void replay_folder(const char *folder)
{
    DIR *entries = opendir(folder);
    struct dirent *entry;
    char path[4096];

    REQUIRE(entries != NULL);
    while ((entry = readdir(entries)) != NULL) {
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        replay_file(path);
    }
    closedir(entries);
}

int main(int count, char **paths)
{
    for (int i = 1; i < count; i++) {
        struct stat status;

        REQUIRE(stat(paths[i], &status) == 0);
        if (S_ISDIR(status.st_mode))
            replay_folder(paths[i]);
        else
            replay_file(paths[i]);
    }
    printf("%u inputs replayed\n", replayed);
    return 0;
}
