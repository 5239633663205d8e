-- Forgets a session, not its tasks. KEYS[1] the owner's sessions, KEYS[2] the session's totals. ARGV: session.
-- Tasks that come later begin it again.
redis.call('TYPE', KEYS[1])
redis.call('TYPE', KEYS[2])
if redis.call('ZREM', KEYS[1], ARGV[3]) == 1 then redis.call('HSET', KEYS[2], 'deleted_at', digits(now_us())) end
return 1
