-- Forgets an agent's record; its tasks stay. KEYS[1] the record, KEYS[2] the organisation's agents. ARGV: id.
-- Answers how many there were.
redis.call('ZREM', KEYS[2], ARGV[1])
return redis.call('DEL', KEYS[1])
