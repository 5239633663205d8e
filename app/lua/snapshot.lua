-- A snapshot and its text in one step. KEYS[1] the hash, KEYS[2] the text. Answers {fields, text}.
return { redis.call('HGETALL', KEYS[1]), redis.call('GET', KEYS[2]) or '' }
