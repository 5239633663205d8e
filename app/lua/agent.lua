-- An agent's record: made where there is none, changed where it says otherwise. KEYS[1] the record, KEYS[2] the
-- organisation's agents. ARGV: id, at most so many records (0: as many as there are asked for), then field, value …
-- Answers the record; empty: there is none, and no room for it.
local id, most = ARGV[1], tonumber(ARGV[2])
local new, count = redis.call('EXISTS', KEYS[1]) == 0, redis.call('ZCARD', KEYS[2])
if new and most > 0 and count >= most then return {} end
local changed = {}
for i = 3, #ARGV, 2 do
  if (redis.call('HGET', KEYS[1], ARGV[i]) or '') ~= ARGV[i + 1] then
    changed[#changed + 1] = ARGV[i]
    changed[#changed + 1] = ARGV[i + 1]
  end
end
if new or #changed > 0 then
  local time = redis.call('TIME')
  local now = time[1] .. string.format('%06d', time[2])
  redis.call('HSET', KEYS[1], 'updated_at', now, unpack(changed))
  redis.call('HINCRBY', KEYS[1], 'version', 1)
  if new then
    redis.call('HSET', KEYS[1], 'created_at', now)
    redis.call('ZADD', KEYS[2], now, id)
  end
end
return redis.call('HGETALL', KEYS[1])
