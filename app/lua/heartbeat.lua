-- What a registered worker says of itself. KEYS[1] its record. ARGV: seconds for which that stays; how many slots have
-- become free, '' when it says nothing of them; then the fields of a new record.
-- Answers the time in µs; 0: there is no such worker, and none is made of it.
if #ARGV == 2 and redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local time = redis.call('TIME')
local now = tonumber(time[1] .. string.format('%06d', time[2]))
redis.call('HSET', KEYS[1], 'heartbeat_at', string.format('%.0f', now), unpack(ARGV, 3))
if ARGV[2] ~= '' then redis.call('HINCRBY', KEYS[1], 'freed', ARGV[2]) end
redis.call('EXPIRE', KEYS[1], ARGV[1])
return now
